//! The tables for firmware: files, and the script by which it places them in memory and makes them refer to each other.
//!
//! Firmware allocates each file, adds a file's address to the pointers to it, and brings the checksums up to date. What
//! a pointer holds in the file is the offset of what it points to. QEMU, *bios-linker-loader* in *ACPI tables and NVDIMM
//! internals*; the commands have 128 bytes each.

use super::{AcpiConfig, AcpiError, Assembled, Block, root_pointer};

/// The file of all tables but the RSDP.
const TABLES: &str = "etc/acpi/tables";
/// The file of the RSDP.
const RSDP: &str = "etc/acpi/rsdp";
/// The script's file.
const SCRIPT: &str = "etc/table-loader";

const COMMAND_SIZE: usize = 128;
const NAME_SIZE: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Anywhere below 4 GiB.
const ZONE_HIGH: u8 = 1;
/// Where an operating system scans for the RSDP.
const ZONE_FSEG: u8 = 2;

/// A table's header: its length and its checksum.
const LENGTH: usize = 4;
const CHECKSUM: u32 = 9;
const HEADER: u64 = 36;
/// The FADT's pointers: FIRMWARE_CTRL, DSDT, X_DSDT.
const FADT_FACS: u64 = 36;
const FADT_DSDT: u64 = 40;
const FADT_X_DSDT: u64 = 140;
/// The RSDP's pointers and its two checksums, of its first 20 bytes and of all.
const RSDP_RSDT: u64 = 16;
const RSDP_XSDT: u64 = 24;
const RSDP_CHECKSUMS: [(u32, u32); 2] = [(8, 20), (32, 36)];
const RSDP_ALIGNMENT: u32 = 16;

/// Names and contents.
pub type LoaderFiles = Vec<(String, Vec<u8>)>;

/// The files by which firmware installs the tables.
///
/// # Errors
/// [`AcpiError`] for too many processors, or none.
pub fn loader_files(config: &AcpiConfig) -> Result<LoaderFiles, AcpiError> {
    let facs = 0;
    let assembled = Assembled::new(config, Block::ALIGNMENT as u64, facs)?;
    let mut tables = vec![0; assembled.end as usize];
    for (offset, bytes) in &assembled.tables {
        let start = *offset as usize;
        tables[start..start + bytes.len()].copy_from_slice(bytes);
    }
    let Assembled { fadt, listed, xsdt, rsdt, .. } = &assembled;
    let mut script = Script::default();
    script.allocate(TABLES, Block::ALIGNMENT as u32, ZONE_HIGH);
    script.allocate(RSDP, RSDP_ALIGNMENT, ZONE_FSEG);
    for (offset, size) in [(FADT_FACS, 4), (FADT_DSDT, 4), (FADT_X_DSDT, 8)] {
        script.add_pointer(TABLES, fadt + offset, size);
    }
    for index in 0..listed.len() as u64 {
        script.add_pointer(TABLES, rsdt + HEADER + 4 * index, 4);
        script.add_pointer(TABLES, xsdt + HEADER + 8 * index, 8);
    }
    script.add_pointer(RSDP, RSDP_RSDT, 4);
    script.add_pointer(RSDP, RSDP_XSDT, 8);
    for table in [*fadt, *rsdt, *xsdt] {
        let length =
            tables[table as usize + LENGTH..].first_chunk().map_or(0, |len| u32::from_le_bytes(*len));
        script.add_checksum(TABLES, table as u32 + CHECKSUM, table as u32, length);
    }
    for (checksum, length) in RSDP_CHECKSUMS {
        script.add_checksum(RSDP, checksum, 0, length);
    }
    let rsdp = root_pointer(*rsdt, *xsdt);
    Ok([(TABLES, tables), (RSDP, rsdp), (SCRIPT, script.0)]
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .into())
}

/// Commands, one after another.
#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, command: u32, fields: &[&[u8]]) {
        let start = self.0.len();
        self.0.extend(command.to_le_bytes());
        fields.iter().for_each(|field| self.0.extend(*field));
        self.0.resize(start + COMMAND_SIZE, 0);
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: u8) {
        self.command(ALLOCATE, &[&name(file), &alignment.to_le_bytes(), &[zone]]);
    }

    /// The pointer of `size` bytes at `offset` in `file` is one into the tables.
    fn add_pointer(&mut self, file: &str, offset: u64, size: u8) {
        self.command(ADD_POINTER, &[&name(file), &name(TABLES), &(offset as u32).to_le_bytes(), &[size]]);
    }

    /// The byte at `offset` makes the sum of a range zero.
    fn add_checksum(&mut self, file: &str, offset: u32, start: u32, length: u32) {
        let [offset, start, length] = [offset, start, length].map(u32::to_le_bytes);
        self.command(ADD_CHECKSUM, &[&name(file), &offset, &start, &length]);
    }
}

/// A file's name with zeros behind it; the names here are short.
fn name(file: &str) -> [u8; NAME_SIZE] {
    let mut field = [0; NAME_SIZE];
    field[..file.len()].copy_from_slice(file.as_bytes());
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the tests' firmware places the files.
    const PLACES: [(&str, u32); 2] = [(TABLES, 0x3ff_0000), (RSDP, 0xf_5a40)];

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// Carries out the script as firmware does.
    fn install(files: &LoaderFiles) -> Vec<(u32, Vec<u8>)> {
        let find = |field: &[u8]| {
            let len = field.iter().position(|&byte| byte == 0).unwrap();
            PLACES.iter().position(|(name, _)| name.as_bytes() == &field[..len]).unwrap()
        };
        let mut placed: Vec<_> = PLACES
            .iter()
            .map(|(name, at)| (*at, files.iter().find(|file| file.0 == *name).unwrap().1.clone()))
            .collect();
        let mut allocated = 0;
        for command in files.iter().find(|file| file.0 == SCRIPT).unwrap().1.chunks(COMMAND_SIZE) {
            let file = find(&command[4..60]);
            match u32_at(command, 0) {
                ALLOCATE => {
                    assert_eq!(placed[file].0 % u32_at(command, 60), 0);
                    allocated += 1;
                }
                ADD_POINTER => {
                    let (at, size) = (u32_at(command, 116) as usize, usize::from(command[120]));
                    let mut value = [0; 8];
                    value[..size].copy_from_slice(&placed[file].1[at..at + size]);
                    let target = u64::from(placed[find(&command[60..116])].0);
                    let value = (u64::from_le_bytes(value) + target).to_le_bytes();
                    placed[file].1[at..at + size].copy_from_slice(&value[..size]);
                }
                ADD_CHECKSUM => {
                    let [at, start, len] = [60, 64, 68].map(|field| u32_at(command, field) as usize);
                    let bytes = &mut placed[file].1;
                    bytes[at] = bytes[at].wrapping_sub(sum(&bytes[start..start + len]));
                }
                other => panic!("command {other}"),
            }
        }
        assert_eq!(allocated, 2);
        placed
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn firmware_that_runs_the_script_has_tables_that_refer_to_each_other() {
        let config = AcpiConfig { cpus: 3, ..AcpiConfig::default() };
        let files = loader_files(&config).unwrap();
        let placed = install(&files);
        let (base, tables) = &placed[0];
        let table = |address: u32| {
            let at = (address - base) as usize;
            let bytes = &tables[at..at + u32_at(tables, at + LENGTH) as usize];
            assert!(&bytes[..4] == b"FACS" || sum(bytes) == 0, "{:?}", &bytes[..4]);
            bytes
        };
        let rsdp = &placed[1].1;
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(rsdp)), (&b"RSD PTR "[..], 0, 0));
        let (rsdt, xsdt) = (table(u32_at(rsdp, 16)), table(u32_at(rsdp, 24)));
        assert_eq!((&rsdt[..4], &xsdt[..4]), (&b"RSDT"[..], &b"XSDT"[..]));
        let listed: Vec<u32> = rsdt[36..].chunks(4).map(|entry| u32_at(entry, 0)).collect();
        assert_eq!(listed, xsdt[36..].chunks(8).map(|entry| u32_at(entry, 0)).collect::<Vec<_>>());
        let fadt = table(listed[0]);
        assert_eq!(&fadt[..4], b"FACP");
        assert_eq!(&table(u32_at(fadt, 36))[..4], b"FACS");
        assert_eq!(u32_at(fadt, 36) % 64, 0);
        assert_eq!(&table(u32_at(fadt, 40))[..4], b"DSDT");
        assert_eq!(u32_at(fadt, 140), u32_at(fadt, 40));
        for &address in &listed[1..] {
            table(address);
        }
    }
}
