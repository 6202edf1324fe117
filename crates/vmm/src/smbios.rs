//! The SMBIOS tables for firmware: what the machine is called, and what it has. DMTF, *System Management BIOS (SMBIOS)
//! Reference Specification*, version 2.8.
//!
//! Firmware puts its own BIOS information (type 0) in front, and places the tables.

use crate::layout::MIB;

/// The file of the entry point.
const ANCHOR: &str = "etc/smbios/smbios-anchor";
/// The file of the structures.
const TABLES: &str = "etc/smbios/smbios-tables";

const MAKER: &str = "Ringside";
/// Handles of the structures that others refer to.
const CHASSIS: u16 = 0x0300;
const MEMORY_ARRAY: u16 = 0x1000;
/// No handle: there is no such thing, or no such information.
const NO_HANDLE: u16 = 0xffff;
const NO_ERROR_INFORMATION: u16 = 0xfffe;
/// A memory device's size that is given elsewhere.
const EXTENDED_SIZE: u16 = 0x7fff;
const EXTENDED_CAPACITY: u32 = 0x8000_0000;

/// The two files, for a machine with so many vCPUs and bytes of memory.
pub fn files(cpus: u32, memory: u64) -> Vec<(String, Vec<u8>)> {
    let structures = [
        system(),
        chassis(),
        processor(cpus),
        memory_array(memory),
        memory_device(memory),
        structure(32, 0x2000, &[0; 7], &[]),
        structure(127, 0x7f00, &[], &[]),
    ];
    let largest = structures.iter().map(Vec::len).max().unwrap_or(0);
    let tables = structures.concat();
    let anchor = entry_point(tables.len(), largest, structures.len());
    vec![(ANCHOR.to_owned(), anchor), (TABLES.to_owned(), tables)]
}

/// A structure: header, formatted area, strings.
fn structure(kind: u8, handle: u16, body: &[u8], strings: &[&str]) -> Vec<u8> {
    let mut bytes = vec![kind, body.len() as u8 + 4];
    bytes.extend(handle.to_le_bytes());
    bytes.extend(body);
    for text in strings {
        bytes.extend(text.as_bytes());
        bytes.push(0);
    }
    bytes.resize(bytes.len() + if strings.is_empty() { 2 } else { 1 }, 0);
    bytes
}

/// System Information: no UUID, woken by the power switch.
fn system() -> Vec<u8> {
    const POWER_SWITCH: u8 = 6;
    let body = [&[1, 2, 3, 0][..], &[0; 16], &[POWER_SWITCH, 0, 0]].concat();
    structure(1, 0x0100, &body, &[MAKER, "Virtual Machine", env!("CARGO_PKG_VERSION")])
}

/// System Enclosure: of another kind, all states safe.
fn chassis() -> Vec<u8> {
    const OTHER: u8 = 1;
    const SAFE: u8 = 3;
    const NO_SECURITY: u8 = 3;
    let body = [1, OTHER, 0, 0, 0, SAFE, SAFE, SAFE, NO_SECURITY, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    structure(3, CHASSIS, &body, &[MAKER])
}

/// Processor Information: all vCPUs are cores of one package.
fn processor(cpus: u32) -> Vec<u8> {
    const CENTRAL: u8 = 3;
    const OTHER: u8 = 1;
    const POPULATED_AND_ENABLED: u8 = 0x41;
    const IS_64_BIT: u16 = 1 << 2;
    let count = u8::try_from(cpus).unwrap_or(0xff);
    let mut body = vec![1, CENTRAL, OTHER, 2];
    body.extend([0; 8]);
    body.extend([0, 0]);
    body.extend([0; 6]);
    body.extend([POPULATED_AND_ENABLED, OTHER]);
    body.extend([NO_HANDLE; 3].iter().flat_map(|handle| handle.to_le_bytes()));
    body.extend([0, 0, 0, count, count, count]);
    body.extend(IS_64_BIT.to_le_bytes());
    body.extend(u16::from(OTHER).to_le_bytes());
    structure(4, 0x0400, &body, &["CPU 0", MAKER])
}

/// Physical Memory Array: one, of system memory.
fn memory_array(memory: u64) -> Vec<u8> {
    const ON_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_CORRECTION: u8 = 3;
    let kib = u32::try_from(memory >> 10).ok().filter(|&kib| kib < EXTENDED_CAPACITY);
    let mut body = vec![ON_BOARD, SYSTEM_MEMORY, NO_CORRECTION];
    body.extend(kib.unwrap_or(EXTENDED_CAPACITY).to_le_bytes());
    body.extend(NO_ERROR_INFORMATION.to_le_bytes());
    body.extend(1u16.to_le_bytes());
    body.extend(if kib.is_some() { 0 } else { memory }.to_le_bytes());
    structure(16, MEMORY_ARRAY, &body, &[])
}

/// Memory Device: one with all of the memory.
fn memory_device(memory: u64) -> Vec<u8> {
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    const OTHER: u16 = 1 << 1;
    let mib = memory / MIB;
    let size = u16::try_from(mib).ok().filter(|&mib| mib < EXTENDED_SIZE);
    let mut body = Vec::new();
    body.extend([MEMORY_ARRAY, NO_ERROR_INFORMATION, 64, 64].iter().flat_map(|word| word.to_le_bytes()));
    body.extend(size.unwrap_or(EXTENDED_SIZE).to_le_bytes());
    body.extend([DIMM, 0, 1, 0, RAM]);
    body.extend(OTHER.to_le_bytes());
    body.extend(0u16.to_le_bytes());
    body.extend([2, 0, 0, 0, 0]);
    body.extend(if size.is_some() { 0 } else { mib as u32 }.to_le_bytes());
    body.extend([0; 8]);
    structure(17, 0x1100, &body, &["DIMM 0", MAKER])
}

/// The entry point, whose checksums and table address are the firmware's to fill in.
fn entry_point(tables: usize, largest: usize, count: usize) -> Vec<u8> {
    const LEN: u8 = 31;
    let mut bytes = b"_SM_".to_vec();
    bytes.extend([0, LEN, 2, 8]);
    bytes.extend((largest as u16).to_le_bytes());
    bytes.extend([0; 6]);
    bytes.extend(b"_DMI_");
    bytes.push(0);
    bytes.extend((tables as u16).to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend((count as u16).to_le_bytes());
    bytes.push(0x28);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type, formatted area and strings of each structure.
    fn parse(mut tables: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while let [kind, len, ..] = *tables {
            let (formatted, rest) = tables.split_at(len.into());
            let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = rest[..end].split(|&byte| byte == 0).filter(|text| !text.is_empty());
            let strings = strings.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect();
            found.push((kind, formatted.to_vec(), strings));
            tables = &rest[end + 2..];
        }
        found
    }

    #[test]
    fn structures_have_the_lengths_of_their_version_and_name_the_machine() {
        let files = files(4, 3072 * MIB);
        let (anchor, tables) = (&files[0].1, &files[1].1);
        let found = parse(tables);
        let kinds: Vec<_> = found.iter().map(|(kind, formatted, _)| (*kind, formatted.len())).collect();
        assert_eq!(kinds, [(1, 27), (3, 22), (4, 42), (16, 23), (17, 40), (32, 11), (127, 4)]);
        assert_eq!(found[0].2[..2], ["Ringside", "Virtual Machine"]);
        assert_eq!(found[2].1[35], 4, "cores");
        assert_eq!(found[4].1[12..14], 3072u16.to_le_bytes());
        assert_eq!((anchor.len(), &anchor[..4], &anchor[16..21]), (31, &b"_SM_"[..], &b"_DMI_"[..]));
        assert_eq!(anchor[22..24], (tables.len() as u16).to_le_bytes());
        assert_eq!(anchor[28..30], 7u16.to_le_bytes());
    }

    #[test]
    fn memory_beyond_the_old_fields_is_in_the_new_ones() {
        let found = parse(&files(1, 3 << 40)[1].1);
        assert_eq!(found[3].1[15..23], (3u64 << 40).to_le_bytes());
        assert_eq!(found[4].1[12..14], EXTENDED_SIZE.to_le_bytes());
        assert_eq!(found[4].1[28..32], (3u32 << 20).to_le_bytes());
    }
}
