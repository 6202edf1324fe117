//! The architectural state, between [`VcpuState`] and KVM's structures.
#![allow(unsafe_code)] // KVM_SET_XSAVE.

use engine::{EngineError, HostXsave, VcpuState, VectorState, XSAVE_AREA_SIZE};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs, kvm_dtable, kvm_mp_state,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use x86::descriptor::Attributes;
use x86::{Cr0, Cr4, Efer, Flags, Segment, Selector, TableRegister};

use crate::error::{host, refused};
use crate::msrs;

/// Reads everything, with the model-specific registers of that list.
pub(crate) fn read(vcpu: &VcpuFd, msr_list: &[u32]) -> Result<VcpuState, EngineError> {
    // First of all: KVM brings a pending INIT or SIPI to effect when it is asked for this.
    let mp_state = vcpu.get_mp_state().map_err(host("KVM_GET_MP_STATE"))?.mp_state;
    let regs = vcpu.get_regs().map_err(host("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(host("KVM_GET_SREGS"))?;
    let debug = vcpu.get_debug_regs().map_err(host("KVM_GET_DEBUGREGS"))?;
    let xcrs = vcpu.get_xcrs().map_err(host("KVM_GET_XCRS"))?;
    let xsave = vcpu.get_xsave().map_err(host("KVM_GET_XSAVE"))?;
    let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|register| register.xcr == 0);
    let [dr0, dr1, dr2, dr3] = debug.db;
    Ok(VcpuState {
        gprs: gprs(&regs),
        rip: regs.rip,
        rflags: Flags::from_bits_retain(regs.rflags),
        segments: [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs].map(from_segment),
        tr: from_segment(sregs.tr),
        ldtr: from_segment(sregs.ldt),
        gdtr: from_table(sregs.gdt),
        idtr: from_table(sregs.idt),
        cr0: Cr0::from_bits_retain(sregs.cr0),
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: Cr4::from_bits_retain(sregs.cr4),
        efer: Efer::from_bits_retain(sregs.efer),
        xcr0: xcr0.map_or(1, |register| register.value),
        debug: [dr0, dr1, dr2, dr3, debug.dr6, debug.dr7],
        vector: from_xsave(&xsave),
        msrs: msrs::read(vcpu, msr_list)?,
        waits_for_sipi: matches!(mp_state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED),
        halted: mp_state == KVM_MP_STATE_HALTED,
    })
}

/// Replaces everything. Events that were about to be delivered are dropped.
pub(crate) fn write(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    // The local APIC's base and CR8 stand elsewhere: what KVM has stays.
    let current = vcpu.get_sregs().map_err(host("KVM_GET_SREGS"))?;
    vcpu.set_sregs(&sregs(state, &current)).map_err(refused("the control and segment registers"))?;
    vcpu.set_regs(&regs(state)).map_err(refused("the general registers"))?;
    vcpu.set_xcrs(&xcrs(state)).map_err(refused("XCR0"))?;
    // SAFETY: KVM reads more than the 4,096 bytes only for a guest that was permitted states beyond them (AMX); this
    // process never asks for that permission.
    unsafe { vcpu.set_xsave(&to_xsave(&state.vector)) }.map_err(refused("the vector registers"))?;
    vcpu.set_debug_regs(&debug_registers(state)).map_err(refused("the debug registers"))?;
    msrs::write(vcpu, &state.msrs)?;
    let none = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    vcpu.set_vcpu_events(&none).map_err(host("KVM_SET_VCPU_EVENTS"))?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: mp_state(state) }).map_err(refused("the activity state"))
}

fn mp_state(state: &VcpuState) -> u32 {
    match (state.waits_for_sipi, state.halted) {
        (true, _) => KVM_MP_STATE_INIT_RECEIVED,
        (false, true) => KVM_MP_STATE_HALTED,
        (false, false) => KVM_MP_STATE_RUNNABLE,
    }
}

/// RAX to R15 in the order of their encoding.
fn gprs(r: &kvm_regs) -> [u64; 16] {
    [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ]
}

fn regs(state: &VcpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gprs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: (state.rflags | Flags::FIXED).bits(),
    }
}

fn sregs(state: &VcpuState, current: &kvm_sregs) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(to_segment);
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: to_segment(&state.tr),
        ldt: to_segment(&state.ldtr),
        gdt: to_table(&state.gdtr),
        idt: to_table(&state.idtr),
        cr0: state.cr0.bits(),
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4.bits(),
        cr8: current.cr8,
        efer: state.efer.bits(),
        apic_base: current.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

fn xcrs(state: &VcpuState) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: state.xcr0, ..Default::default() };
    xcrs
}

fn debug_registers(state: &VcpuState) -> kvm_debugregs {
    let [dr0, dr1, dr2, dr3, dr6, dr7] = state.debug;
    kvm_debugregs { db: [dr0, dr1, dr2, dr3], dr6, dr7, ..Default::default() }
}

fn from_xsave(xsave: &kvm_xsave) -> VectorState {
    let mut vector = VectorState::default();
    for (bytes, word) in vector.0.chunks_exact_mut(4).zip(&xsave.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    *vector.0 = HostXsave::get().from_host(&vector.0);
    vector
}

fn to_xsave(vector: &VectorState) -> kvm_xsave {
    const { assert!(XSAVE_AREA_SIZE.is_multiple_of(4) && XSAVE_AREA_SIZE <= size_of::<kvm_xsave>()) };
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(HostXsave::get().to_host(&vector.0).chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    xsave
}

fn from_table(table: kvm_dtable) -> TableRegister {
    TableRegister { base: table.base, limit: table.limit }
}

fn to_table(table: &TableRegister) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

fn from_segment(s: kvm_segment) -> Segment {
    let flag = |set: u8, flag: Attributes| if set != 0 { flag } else { Attributes::empty() };
    let attributes = Attributes::from_bits_retain(u32::from(s.type_ & 0xf) | u32::from(s.dpl & 3) << 5)
        | flag(s.s, Attributes::S)
        | flag(s.present, Attributes::P)
        | flag(s.avl, Attributes::AVL)
        | flag(s.l, Attributes::L)
        | flag(s.db, Attributes::DB)
        | flag(s.g, Attributes::G)
        | flag(s.unusable, Attributes::UNUSABLE);
    Segment { selector: Selector(s.selector), base: s.base, limit: s.limit, attributes }
}

fn to_segment(segment: &Segment) -> kvm_segment {
    let has = |flag| u8::from(segment.attributes.contains(flag));
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector.0,
        type_: (segment.attributes.bits() & 0xf) as u8,
        present: has(Attributes::P),
        dpl: segment.dpl(),
        db: has(Attributes::DB),
        s: has(Attributes::S),
        l: has(Attributes::L),
        g: has(Attributes::G),
        avl: has(Attributes::AVL),
        unusable: has(Attributes::UNUSABLE),
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_keep_every_attribute() {
        for attributes in (0..1 << 17).map(Attributes::from_bits_truncate) {
            let segment =
                Segment { selector: Selector(0x2b), base: 0x1234_5678_9abc, limit: 0xfff_ffff, attributes };
            assert_eq!(from_segment(to_segment(&segment)), segment);
        }
    }

    #[test]
    fn general_registers_keep_their_order() {
        let mut state = VcpuState::reset();
        state.gprs = std::array::from_fn(|n| n as u64 + 100);
        let regs = regs(&state);
        assert_eq!((regs.rcx, regs.rsp, regs.r15), (101, 104, 115));
        assert_eq!(gprs(&regs), state.gprs);
    }

    #[test]
    fn the_vector_state_is_copied_whole() {
        let mut vector = VectorState::default();
        vector.0.iter_mut().enumerate().for_each(|(n, byte)| *byte = n as u8);
        let host = HostXsave::get();
        // Without the gaps between components, and what the host lacks.
        *vector.0 = host.from_host(&host.to_host(&vector.0));
        assert_eq!(from_xsave(&to_xsave(&vector)), vector);
        assert!(vector.0[160..832].iter().any(|&byte| byte != 0));
    }
}
