//! The initramfs: busybox, the modules and an init script, as an uncompressed cpio archive ("newc", as the kernel's
//! *initramfs buffer format* has it).
//!
//! It is not compressed because the guest would have to unpack it, and its modules are those of the default guests alone.
//! It is two archives in a row: `base`, made of the packages, and `system`, which comes with this program, so that a
//! newer Ringside brings its own init without fetching anything.
//!
//! # How a command is run
//! The machine appends [`exec_overlay`] to the archive. Init then runs `/ringside/exec` with its output on the second
//! serial line (`/dev/ttyS1`, raw: every byte arrives as it was written), its errors on the third where the machine has
//! one, and nothing to read. When both lines have sent everything, it writes the command's status (0 to 255) as 32 bits to the
//! debug-exit port 0xf4. Where nobody takes that write, it powers off.

use std::io::{self, Write};

use super::modules::{self, ModuleInfo};
use super::{GuestError, report};

/// The init script.
const INIT: &str = include_str!("init.sh");
/// What it reads where a folder of the host is the root file system.
const ROOT: &str = include_str!("root.sh");
/// The buses that init looks at.
const BUSES: &[&str] = &["pci", "acpi", "virtio", "nd"];

/// What busybox is called as; the names that Debian's has and that make sense in this guest.
const APPLETS: &str = "[ [[ acpid arp arping ascii ash awk base64 basename bc blkdiscard blockdev brctl bunzip2 bzcat \
    bzip2 cal cat chgrp chmod chown chroot clear cmp cp cpio crc32 cttyhack cut date dc dd depmod devmem df diff dirname \
    dmesg du dumpleases echo ed egrep env expand expr factor fallocate false fdisk fgrep find findfs fold free fsfreeze \
    fstrim ftpget ftpput getopt getty grep groups gunzip gzip halt head hexdump hostid hostname httpd hwclock id ifconfig \
    insmod ionice ip ipcalc ipneigh kill killall klogd last less link linux32 linux64 ln logger login logname losetup ls \
    lsmod lsscsi lzcat lzma lzop md5sum mdev microcom mkdir mke2fs mkfifo mknod mkswap mktemp modinfo modprobe more mount \
    mt mv nameif nc netstat nl nologin nproc nsenter nslookup nuke od partprobe paste patch pidof ping ping6 pivot_root \
    poweroff printf ps pwd rdate readlink realpath reboot renice reset resume rev rm rmdir rmmod route run-parts sed seq \
    setpriv setsid sh sha1sum sha256sum sha3sum sha512sum shred shuf sleep sort ssl_client start-stop-daemon stat strings \
    stty su swapoff swapon switch_root sync sysctl syslogd tac tail tar taskset tc tee telnet telnetd test tftp time \
    timeout top touch tr traceroute traceroute6 true truncate ts tty tunctl udhcpc udhcpd uevent umount uname \
    uncompress unexpand uniq unlink unlzma unshare unxz unzip uptime usleep uudecode uuencode vconfig vi w watch watchdog \
    wc wget which who whoami xargs xxd xz xzcat yes zcat";

/// What init calls: busybox's, whatever a package puts into `/bin`.
const INIT_APPLETS: &str =
    "cat chroot cp ip mkdir modprobe mount mv poweroff rm setsid sh sleep stty switch_root sync umount uname";

const FSTAB: &str = "proc /proc proc nosuid,nodev,noexec 0 0
sys /sys sysfs nosuid,nodev,noexec 0 0
pts /dev/pts devpts mode=0620,gid=5,ptmxmode=0666 0 0
shm /dev/shm tmpfs nosuid,nodev 0 0
run /run tmpfs nosuid,nodev,mode=0755 0 0
tmp /tmp tmpfs nosuid,nodev,mode=1777 0 0
";
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:*:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost ringside\n::1 localhost\n";

/// A module with its bytes, ready for the archive.
#[derive(Clone, Debug)]
pub(super) struct LoadedModule {
    /// Its path below `lib/modules/VERSION`, without a compression's ending.
    pub path: String,
    /// What it says of itself.
    pub info: ModuleInfo,
    /// The ELF file.
    pub data: Vec<u8>,
}

/// What an initramfs is made of.
pub(super) struct Contents<'a> {
    /// The kernel's version: the folder of its modules.
    pub kernel_version: &'a str,
    /// The static busybox.
    pub busybox: &'a [u8],
    /// The modules, each after all that it needs.
    pub modules: &'a [LoadedModule],
}

/// Writes the archive that is made of the packages.
///
/// # Errors
/// Where the writer fails, and [`GuestError::Package`] for a kernel version that cannot be a folder's name.
pub(super) fn base(contents: &Contents<'_>, writer: &mut dyn Write) -> Result<(), GuestError> {
    let version = contents.kernel_version;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+' | '_' | '~');
    if version.is_empty() || version.len() > 100 || version.starts_with('.') || !version.chars().all(plain) {
        return Err(GuestError::package(version, "this is no kernel version"));
    }
    let failed = GuestError::file("write", std::path::Path::new("the initramfs"));
    write_all(contents, &mut Archive::new(writer)).map_err(failed)
}

fn write_all(contents: &Contents<'_>, archive: &mut Archive<'_>) -> io::Result<()> {
    for folder in
        "bin dev dev/pts dev/shm etc lib lib/modules mnt proc ringside ringside/dev ringside/dev/pts \
                   ringside/dev/shm root run sys tmp usr usr/share usr/share/udhcpc var"
            .split_whitespace()
    {
        archive.folder(folder)?;
    }
    for (name, target) in [
        ("sbin", "bin"),
        ("usr/bin", "../bin"),
        ("usr/sbin", "../bin"),
        ("lib64", "lib"),
        ("var/run", "../run"),
    ] {
        archive.link(name, target)?;
    }
    // What devtmpfs does not bring: init copies it.
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        archive.link(&format!("ringside/dev/{name}"), target)?;
    }
    // What the kernel opens for init, before init has mounted anything.
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.file("bin/busybox", 0o755, contents.busybox)?;
    for applet in APPLETS.split_whitespace() {
        archive.link(&format!("bin/{applet}"), "busybox")?;
    }
    write_modules(contents, archive)?;
    archive.file("ringside/drivers", 0o644, drivers(contents.modules).as_bytes())?;
    archive.finish()
}

/// The archive that comes with this program: init and its configuration.
pub(super) fn system() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = Archive::new(&mut bytes);
    let texts = [("etc/fstab", FSTAB), ("etc/passwd", PASSWD), ("etc/group", GROUP), ("etc/hosts", HOSTS)];
    let link =
        |archive: &mut Archive<'_>, name| archive.link(&format!("ringside/bin/{name}"), "/bin/busybox");
    let written = texts
        .iter()
        .try_for_each(|(name, text)| archive.file(name, 0o644, text.as_bytes()))
        .and_then(|()| archive.folder("ringside/bin"))
        .and_then(|()| INIT_APPLETS.split_whitespace().try_for_each(|name| link(&mut archive, name)))
        .and_then(|()| archive.file("ringside/report", 0o755, &report::program()))
        .and_then(|()| archive.file("ringside/root.sh", 0o644, ROOT.as_bytes()))
        .and_then(|()| archive.file("init", 0o755, INIT.as_bytes()))
        .and_then(|()| archive.finish());
    debug_assert!(written.is_ok(), "a vector takes everything");
    bytes
}

fn write_modules(contents: &Contents<'_>, archive: &mut Archive<'_>) -> io::Result<()> {
    let root = format!("lib/modules/{}", contents.kernel_version);
    let mut folders = std::collections::BTreeSet::new();
    archive.folder(&root)?;
    for module in contents.modules {
        for (at, _) in module.path.match_indices('/') {
            if folders.insert(&module.path[..at]) {
                archive.folder(&format!("{root}/{}", &module.path[..at]))?;
            }
        }
        archive.file(&format!("{root}/{}", module.path), 0o644, &module.data)?;
    }
    let order = described(contents.modules);
    archive.file(&format!("{root}/modules.dep"), 0o644, modules::dep_file(&order).as_bytes())?;
    archive.file(&format!("{root}/modules.alias"), 0o644, modules::alias_file(&order).as_bytes())
}

fn described(modules: &[LoadedModule]) -> Vec<(String, &ModuleInfo)> {
    modules.iter().map(|module| (module.path.clone(), &module.info)).collect()
}

/// A shell function that tells whether there is a driver here for a device: `has_driver "BUS MODALIAS"`.
fn drivers(modules: &[LoadedModule]) -> String {
    let order = described(modules);
    let mut text = "has_driver() {\n    case \"$1\" in\n".to_owned();
    for bus in BUSES {
        if let Some(pattern) = modules::shell_pattern(bus, &order) {
            let pattern =
                pattern.split('|').map(|one| format!("'{bus} '{one}")).collect::<Vec<_>>().join("|");
            text.push_str(&format!("    {pattern}) return 0 ;;\n"));
        }
    }
    text.push_str("    esac\n    return 1\n}\n");
    text
}

/// A small archive to append to the initramfs: makes init run `command` with `sh` and report its status.
pub fn exec_overlay(command: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = Archive::new(&mut bytes);
    let written = archive
        .folder("ringside")
        .and_then(|()| archive.file("ringside/exec", 0o700, command.as_bytes()))
        .and_then(|()| archive.finish());
    debug_assert!(written.is_ok(), "a vector takes everything");
    bytes
}

/// An archive to append to the initramfs: which folders of the host init mounts, a line `TAG TYPE ro|rw` each. The one that
/// is the root file system stands apart.
pub fn shares_overlay(root: Option<&str>, shares: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = Archive::new(&mut bytes);
    let written = archive
        .folder("ringside")
        .and_then(|()| root.map_or(Ok(()), |root| archive.file("ringside/root", 0o600, root.as_bytes())))
        .and_then(|()| archive.file("ringside/shares", 0o600, shares.as_bytes()))
        .and_then(|()| archive.finish());
    debug_assert!(written.is_ok(), "a vector takes everything");
    bytes
}

/// An archive to append to the initramfs: a folder below the root, with programs that anyone may run.
///
/// # Errors
/// Where a program has 4 GiB or more.
pub fn programs_overlay(folder: &str, programs: &[(&str, &[u8])]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut archive = Archive::new(&mut bytes);
    archive.folder(folder)?;
    for (name, program) in programs {
        archive.file(&format!("{folder}/{name}"), 0o755, program)?;
    }
    archive.finish()?;
    Ok(bytes)
}

/// The kernel takes archives in a row if each starts at a multiple of 4 bytes; 512 is what cpio pads to.
const BLOCK: u64 = 512;

/// A cpio archive that is being written.
pub(super) struct Archive<'a> {
    out: Counted<'a>,
    inode: u32,
}

impl<'a> Archive<'a> {
    pub fn new(out: &'a mut dyn Write) -> Self {
        Self { out: Counted { out, written: 0 }, inode: 0 }
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8], device: (u32, u32)) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(data.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut entry = cpio::newc::Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .nlink(1)
            .rdev_major(device.0)
            .rdev_minor(device.1)
            .write(&mut self.out, size);
        entry.write_all(data)?;
        entry.finish().map(drop)
    }

    fn folder(&mut self, name: &str) -> io::Result<()> {
        self.folder_with(name, if name == "root" { 0o700 } else { 0o755 })
    }

    pub fn folder_with(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.entry(name, 0o04_0000 | mode, &[], (0, 0))
    }

    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, 0o10_0000 | mode, data, (0, 0))
    }

    pub fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, 0o12_0777, target.as_bytes(), (0, 0))
    }

    fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, 0o02_0000 | mode, &[], (major, minor))
    }

    pub fn finish(&mut self) -> io::Result<()> {
        cpio::newc::trailer(&mut self.out)?;
        let padding = self.out.written.next_multiple_of(BLOCK) - self.out.written;
        self.out.write_all(&vec![0; padding as usize])?;
        self.out.flush()
    }
}

/// A writer that knows where it is.
struct Counted<'a> {
    out: &'a mut dyn Write,
    written: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let taken = self.out.write(data)?;
        self.written += taken as u64;
        Ok(taken)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Name → (mode, data) of an archive, as the kernel would read it: several in a row are one.
#[cfg(test)]
pub(super) fn read_archive(mut bytes: &[u8]) -> std::collections::BTreeMap<String, (u32, Vec<u8>)> {
    let mut files = std::collections::BTreeMap::new();
    loop {
        while let [0, rest @ ..] = bytes {
            bytes = rest;
        }
        if bytes.is_empty() {
            return files;
        }
        let mut reader = cpio::newc::Reader::new(bytes).unwrap();
        let entry = reader.entry().clone();
        let mut data = Vec::new();
        io::Read::read_to_end(&mut reader, &mut data).unwrap();
        bytes = reader.finish().unwrap();
        if !entry.is_trailer() {
            files.insert(entry.name().to_owned(), (entry.mode(), data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::read_archive as read;
    use super::*;

    fn module(path: &str, name: &str, alias: &str) -> LoadedModule {
        let info = ModuleInfo { name: name.into(), aliases: vec![alias.into()], ..ModuleInfo::default() };
        LoadedModule { path: path.into(), info, data: b"elf".to_vec() }
    }

    fn example() -> Vec<u8> {
        let modules = [module("kernel/net/e1000.ko", "e1000", "pci:v00008086d00001000*")];
        let contents = Contents { kernel_version: "6.1.0-1-amd64", busybox: b"box", modules: &modules };
        let mut bytes = Vec::new();
        base(&contents, &mut bytes).unwrap();
        bytes.extend(system());
        bytes
    }

    #[test]
    fn the_archive_holds_what_the_kernel_and_init_need() {
        let files = read(&example());
        assert_eq!(files["dev/console"].0, 0o02_0600);
        assert_eq!(files["bin/sh"], (0o12_0777, b"busybox".to_vec()));
        assert_eq!(files["lib/modules/6.1.0-1-amd64/kernel/net/e1000.ko"].1, b"elf");
        let init = String::from_utf8(files["init"].1.clone()).unwrap();
        assert!(init.starts_with("#!/bin/busybox sh\n"));
        let drivers = String::from_utf8(files["ringside/drivers"].1.clone()).unwrap();
        assert!(drivers.contains("'pci 'pci:v00008086d00001000*) return 0 ;;"), "{drivers}");
    }

    #[test]
    fn a_folder_stands_before_what_is_in_it() {
        let bytes = example();
        let at = |name: &str| {
            let name = format!("{name}\0");
            bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap()
        };
        assert!(
            at("lib/modules/6.1.0-1-amd64/kernel/net") < at("lib/modules/6.1.0-1-amd64/kernel/net/e1000.ko")
        );
    }

    #[test]
    fn a_command_comes_as_a_second_archive_whatever_its_bytes() {
        let command = "echo 'ä'\n\nexit 3 # \"\0\"";
        let mut bytes = example();
        assert_eq!(bytes.len() % 512, 0);
        bytes.extend(exec_overlay(command));
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(read(&bytes)["ringside/exec"].1, command.as_bytes());
    }

    #[test]
    fn a_version_that_is_no_folder_name_is_refused() {
        for version in ["", "..", "6.1/../..", "6.1 x"] {
            let contents = Contents { kernel_version: version, busybox: b"", modules: &[] };
            assert!(base(&contents, &mut Vec::new()).is_err(), "{version:?}");
        }
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let contents = Contents { kernel_version: "1", busybox: &[0; 100_000], modules: &[] };
        let mut full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert!(base(&contents, &mut full).unwrap_err().to_string().contains("No space left"));
    }
}
