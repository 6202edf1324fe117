//! C programs of the tests' own: compiled here, statically, and put into the default guest's initramfs.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{debian_file, ringside};

/// What a program with the C library is built with.
const HOSTED: [&str; 1] = ["-pthread"];
/// What a 32-bit program without any library is built with.
pub const BARE_32: [&str; 7] =
    ["-m32", "-msse2", "-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie", "-fno-stack-protector"];

/// Programs and an initramfs that has them in `/ringside`.
pub struct Programs {
    folder: tempfile::TempDir,
}

impl Programs {
    /// Compiles `tests/guest/NAME.c` for each name with the system's C compiler.
    ///
    /// # Panics
    /// Where there is none, or it cannot link statically.
    pub fn new(names: &[&str]) -> Self {
        Self::built(names, &HOSTED)
    }

    /// The same with options of its own for the compiler.
    ///
    /// # Panics
    /// As [`Programs::new`].
    pub fn built(names: &[&str], options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut archive = std::fs::read(debian_file("initramfs.cpio")).expect("the guest's initramfs");
        for name in names {
            let program = folder.path().join(name);
            compile_with(name, options, &program);
            // An archive begins at a multiple of 4 bytes.
            archive.resize(archive.len().next_multiple_of(4), 0);
            entry(&mut archive, &format!("ringside/{name}"), 0o100_755, &std::fs::read(program).unwrap());
            entry(&mut archive, "TRAILER!!!", 0, &[]);
        }
        std::fs::write(folder.path().join("initrd"), archive).expect("written");
        Self { folder }
    }

    /// A program's file on the host.
    pub fn native(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `ringside run` of a shell command in the guest, on the software CPU.
    pub fn run(&self, command: &str) -> Command {
        let mut run = ringside();
        run.args(["run", "--engine", "soft", "--exec", command, "--initrd"]);
        run.arg(self.folder.path().join("initrd"));
        run
    }
}

/// Compiles `tests/guest/NAME.c` for host and guest alike.
///
/// # Panics
/// Where there is no C compiler, or it cannot link statically.
pub fn compile(name: &str, to: &Path) {
    compile_with(name, &HOSTED, to);
}

fn compile_with(name: &str, options: &[&str], to: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest").join(name).with_extension("c");
    let output = Command::new("cc")
        .args(["-O2", "-Wall", "-static"])
        .args(options)
        .arg("-o")
        .arg(to)
        .arg(source)
        .output()
        .expect("a C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// One entry of a cpio archive of the kind "newc", as the kernel's *initramfs buffer format* has it.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let fields = [0, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend(b"070701");
    fields.iter().for_each(|field| archive.extend(format!("{field:08x}").bytes()));
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
