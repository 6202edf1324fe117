//! Protection keys: the rights that PKRU gives to pages of programs and IA32_PKRS to those of the supervisor.
//! SDM vol. 3, *Protection Keys*.

use x86::Cr4;

use super::Access;
use crate::cpu::Cpu;

/// The registers in force: two bits for each key, the lower one disables all accesses and the upper one writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    /// PKRU with CR4.PKE.
    pub user: Option<u32>,
    /// IA32_PKRS with CR4.PKS.
    pub supervisor: Option<u32>,
}

impl Keys {
    /// The keys whose rights differ from another's, one bit for each.
    fn changed(self, other: Self) -> u16 {
        let differ = |a: Option<u32>, b: Option<u32>| a.unwrap_or(0) ^ b.unwrap_or(0);
        let bits = differ(self.user, other.user) | differ(self.supervisor, other.supervisor);
        (0..16).filter(|key| bits >> (2 * key) & 3 != 0).fold(0, |keys, key| keys | 1 << key)
    }
}

/// What a page's protection key forbids.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct KeyRights {
    access_disabled: bool,
    write_disabled: bool,
}

impl KeyRights {
    /// Of a key in a register.
    pub(super) fn new(register: u32, key: u8) -> Self {
        let rights = register >> (2 * (key & 15));
        Self { access_disabled: rights & 1 != 0, write_disabled: rights & 2 != 0 }
    }

    /// Whether an access is allowed. `protects_writes`: the writer is a program, or CR0.WP is set.
    pub(super) fn allow(self, access: Access, protects_writes: bool) -> bool {
        match access {
            Access::Read => !self.access_disabled,
            Access::Write => !(self.access_disabled || self.write_disabled && protects_writes),
            Access::Fetch => true,
        }
    }
}

impl Cpu {
    /// The rights of protection keys as the registers have them.
    pub(super) fn keys(&self) -> Keys {
        Keys {
            user: self.cr4.contains(Cr4::PKE).then_some(self.vector.pkru),
            supervisor: self.cr4.contains(Cr4::PKS).then_some(self.msrs.pkrs),
        }
    }

    /// Follows a change of PKRU or IA32_PKRS: what is cached of pages whose keys have other rights now is dropped.
    pub fn update_keys(&mut self) {
        let keys = self.keys();
        let changed = keys.changed(std::mem::replace(&mut self.mmu.paging.keys, keys));
        if changed != 0 {
            self.mmu.tlb.drop_keys(changed);
        }
    }

    /// Writes PKRU.
    pub fn write_pkru(&mut self, value: u32) {
        self.vector.pkru = value;
        self.update_keys();
    }
}
