//! The images of `guests/`: built once for a run of the tests, and packed as Multiboot loaders take them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use object::{Object, ObjectSegment};

/// Bytes before the image in its file: the headers.
const OFFSET: u32 = 0x1000;

/// The image of a guest: 64-bit code in an ELF file of 32 bits.
pub fn image(name: &str) -> PathBuf {
    let built = folder().join("release").join(name);
    let file = std::fs::read(&built).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
    let path = folder().join(format!("{name}.elf"));
    // Tests that run at once may pack it at once: each its own file, then renamed.
    let own = folder().join(format!("{name}.{:?}", std::thread::current().id()));
    std::fs::write(&own, pack(&file)).expect("written");
    std::fs::rename(&own, &path).expect("renamed");
    path
}

/// Builds the guests, if no test of this run did.
fn folder() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        // Where the guests' own configuration is found.
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
        let mut command = Command::new(cargo);
        command
            .current_dir(source)
            .args(["build", "--release", "--locked", "--quiet", "--target-dir"])
            .arg(&folder);
        for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR"] {
            command.env_remove(variable);
        }
        let output = command.output().expect("cargo starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        folder
    })
}

/// An ELF file of 32 bits that has all segments of one of 64 bits as a single one, at their physical addresses.
fn pack(file: &[u8]) -> Vec<u8> {
    let elf = object::read::elf::ElfFile64::<object::Endianness>::parse(file).expect("an ELF file");
    let headers = elf.elf_program_headers().iter();
    let placed = headers.zip(elf.segments()).map(|(header, segment)| {
        let start = header.p_paddr.get(elf.endian()) as u32;
        (start, segment.data().expect("its bytes"), start + segment.size() as u32)
    });
    let placed: Vec<_> = placed.collect();
    let base = placed.iter().map(|segment| segment.0).min().expect("a segment");
    let end = placed.iter().map(|segment| segment.2).max().expect("a segment");
    let mut bytes = Vec::new();
    for (start, data, _) in placed {
        let from = (start - base) as usize;
        if data.is_empty() {
            continue;
        }
        bytes.resize(bytes.len().max(from + data.len()), 0);
        bytes[from..from + data.len()].copy_from_slice(data);
    }
    let len = bytes.len() as u32;
    let mut packed = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0".to_vec();
    packed.extend([elf.entry() as u32, 52, 0, 0].into_iter().flat_map(u32::to_le_bytes));
    packed.extend([52u16, 32, 1, 40, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    packed.extend([1, OFFSET, base, base, len, end - base, 7, 0x1000].into_iter().flat_map(u32::to_le_bytes));
    packed.resize(OFFSET as usize, 0);
    packed.extend(bytes);
    packed
}
