use std::ops::Range;

use super::{ConfigSpace, ConfigWrite, Header, PciFunction};

/// The double words that hold the programmable attribute map: seven bytes from [`PAM_0`] on.
const PAM_REGISTERS: [u16; 2] = [0x58, 0x5c];
/// The first of the attribute bytes, which has 64 KiB to itself; each of the others has twice 16 KiB.
const PAM_0: u16 = 0x59;
const PAM_BYTES: u16 = 7;
/// A segment's attributes: loads, stores.
const READ_ENABLE: u8 = 1 << 0;
const WRITE_ENABLE: u8 = 1 << 1;
/// Where the lower attributes' segments begin, guest-physical.
const LOW_SEGMENTS: u64 = 0xc_0000;
/// The segment of [`PAM_0`].
const BIOS_SEGMENT: Range<u64> = 0xf_0000..0x10_0000;

/// What the bridge makes of a part of the memory from 768 KiB to 1 MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PamSegment {
    /// Guest-physical addresses.
    pub range: Range<u64>,
    /// Whether RAM answers loads; else what is behind the bridge does.
    pub read: bool,
    /// Whether RAM answers stores.
    pub write: bool,
}

/// What carries out a change of the attribute map.
pub type PamEffect = Box<dyn FnMut(&[PamSegment]) + Send>;

/// The host bridge at 00:00.0: an Intel 440FX by its identity, so that guests know what it is, with the subsystem that
/// tells firmware of a virtual machine.
///
/// Of its registers it has the programmable attribute map, where there is firmware to use it. *Intel 440FX PCIset
/// 82441FX (PMC)*, *PAM: Programmable Attribute Map Registers*.
pub struct HostBridge {
    config: ConfigSpace,
    pam: Option<PamEffect>,
}

impl HostBridge {
    /// A bridge without an attribute map: the memory behind it needs no controlling.
    pub fn new() -> Self {
        let header = Header {
            vendor: 0x8086,
            device: 0x1237,
            class: 0x06_0000,
            revision: 2,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            ..Header::default()
        };
        Self { config: ConfigSpace::new(&header), pam: None }
    }

    /// A bridge whose attribute map `effect` carries out, each change with all segments.
    pub fn with_pam(effect: PamEffect) -> Self {
        let mut bridge = Self { pam: Some(effect), ..Self::new() };
        for index in 0..PAM_BYTES {
            let attributes = READ_ENABLE | WRITE_ENABLE;
            let low = if index == 0 { 0 } else { attributes };
            bridge.config.make_writable(PAM_0 + index, attributes << 4 | low);
        }
        bridge
    }

    /// The segments as the registers have them.
    fn segments(&self) -> Vec<PamSegment> {
        let segment = |range, attributes: u8| PamSegment {
            range,
            read: attributes & READ_ENABLE != 0,
            write: attributes & WRITE_ENABLE != 0,
        };
        let byte = |index: u16| {
            let offset = PAM_0 + index;
            self.config.read(offset & !3).to_le_bytes()[usize::from(offset & 3)]
        };
        let mut segments = vec![segment(BIOS_SEGMENT, byte(0) >> 4)];
        for index in 1..PAM_BYTES {
            let start = LOW_SEGMENTS + u64::from(index - 1) * 0x8000;
            segments.push(segment(start..start + 0x4000, byte(index)));
            segments.push(segment(start + 0x4000..start + 0x8000, byte(index) >> 4));
        }
        segments
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }

    fn write_config(&mut self, offset: u16, write: ConfigWrite) {
        let before = self.config.write(offset, write);
        if PAM_REGISTERS.contains(&offset) && before != self.config.read(offset) {
            let segments = self.segments();
            if let Some(effect) = &mut self.pam {
                effect(&segments);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    type Changes = Arc<Mutex<Vec<Vec<PamSegment>>>>;

    fn bridge() -> (HostBridge, Changes) {
        let changes = Changes::default();
        let seen = changes.clone();
        let effect = move |segments: &[PamSegment]| seen.lock().unwrap().push(segments.to_vec());
        (HostBridge::with_pam(Box::new(effect)), changes)
    }

    fn write(bridge: &mut HostBridge, offset: u16, value: u32) {
        bridge.write_config(offset, ConfigWrite { value, mask: u32::MAX });
    }

    #[test]
    fn firmware_shadows_itself_through_the_attribute_map() {
        let (mut bridge, changes) = bridge();
        write(&mut bridge, 0x58, 0x3333_3000);
        let last = changes.lock().unwrap().last().unwrap().clone();
        let at = |address: u64| {
            let segment = last.iter().find(|segment| segment.range.contains(&address)).unwrap();
            (segment.read, segment.write)
        };
        assert_eq!(last.len(), 13);
        assert_eq!([at(0xf_0000), at(0xf_ffff), at(0xc_0000), at(0xc_ffff)], [(true, true); 4]);
        assert_eq!([at(0xd_0000), at(0xe_ffff)], [(false, false); 2]);
        write(&mut bridge, 0x5c, 0x0000_0012);
        let last = changes.lock().unwrap().last().unwrap().clone();
        let at = |address: u64| {
            let segment = last.iter().find(|segment| segment.range.contains(&address)).unwrap();
            (segment.read, segment.write)
        };
        assert_eq!((at(0xd_0000), at(0xd_4000)), ((false, true), (true, false)));
    }

    #[test]
    fn a_write_that_changes_nothing_has_no_effect_and_other_bits_do_not_exist() {
        let (mut bridge, changes) = bridge();
        write(&mut bridge, 0x58, 0);
        write(&mut bridge, 0x50, u32::MAX);
        assert!(changes.lock().unwrap().is_empty());
        write(&mut bridge, 0x58, u32::MAX);
        assert_eq!(bridge.read_config(0x58), 0x3333_3000);
        assert_eq!(bridge.read_config(0x50), 0);
        let mut without = HostBridge::new();
        write(&mut without, 0x58, u32::MAX);
        assert_eq!(without.read_config(0x58), 0);
    }
}
