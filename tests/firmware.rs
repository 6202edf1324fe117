//! Firmware through the whole command: Debian's SeaBIOS to its boot menu, GRUB from a diskette to its menu, both on the
//! serial port; and files that are no firmware.

mod common;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use common::{ringside, run_within, stderr};

/// How long a text may be in coming.
const PATIENCE: Duration = Duration::from_secs(120);
/// What is fetched: firmware, GRUB, and the libraries of its tools.
const PACKAGES: [&str; 8] = [
    "seabios",
    "grub-pc-bin",
    "grub-common",
    "libdevmapper1.02.1",
    "liblzma5",
    "libselinux1",
    "libudev1",
    "libpcre2-8-0",
];
/// Bytes of a diskette.
const DISKETTE: usize = 1440 << 10;

/// The folders of [`PACKAGES`].
fn packages() -> &'static [PathBuf] {
    static UNPACKED: OnceLock<Vec<PathBuf>> = OnceLock::new();
    UNPACKED.get_or_init(|| {
        ringside::guest::unpack(&PACKAGES, &mut *ringside::guest::to_stderr()).expect("Debian's packages")
    })
}

fn seabios(image: &str) -> PathBuf {
    packages()[0].join("share/seabios").join(image)
}

/// A machine with firmware whose serial port is read and written.
struct Session {
    child: Child,
    input: ChildStdin,
    output: Arc<Mutex<Vec<u8>>>,
    /// How much of the output was looked at.
    seen: usize,
}

impl Session {
    fn start(image: &str, arguments: &[&str]) -> Self {
        let mut command = ringside();
        command.args(["run", "--engine", "soft", "--exits", "off", "--firmware"]);
        command.arg(seabios(image)).args(arguments);
        if !arguments.contains(&"--memory") {
            command.args(["--memory", "128M"]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("ringside starts");
        let (input, mut from) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let output = Arc::<Mutex<Vec<u8>>>::default();
        let kept = output.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                kept.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Self { child, input, output, seen: 0 }
    }

    /// Waits for a text after what was waited for before.
    #[track_caller]
    fn expect(&mut self, text: &str) {
        let started = Instant::now();
        loop {
            let output = self.output.lock().unwrap().clone();
            let rest = &output[self.seen..];
            if let Some(at) = rest.windows(text.len()).position(|part| part == text.as_bytes()) {
                self.seen += at + text.len();
                return;
            }
            let ended = self.child.try_wait().expect("a child").is_some();
            let late = started.elapsed() > PATIENCE;
            assert!(!ended && !late, "no {text:?} in {:?}", String::from_utf8_lossy(&output));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn send(&mut self, keys: &[u8]) {
        self.input.write_all(keys).expect("a machine that reads");
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn seabios_offers_its_boot_menu_on_the_serial_port() {
    for (image, cpus) in [("bios-256k.bin", "1"), ("bios.bin", "2")] {
        let mut session = Session::start(image, &["--cpus", cpus, "--boot-menu", "60000"]);
        session.expect("SeaBIOS (version ");
        session.expect("Press ESC for boot menu.");
        session.send(b"\x1b");
        session.expect("Select boot device:");
    }
}

#[test]
fn without_its_menu_seabios_boots_at_once_and_finds_nothing() {
    let mut session = Session::start("bios-256k.bin", &["--boot-menu", "0"]);
    session.expect("No bootable device.");
    let output = session.output.lock().unwrap().clone();
    assert!(!String::from_utf8_lossy(&output).contains("boot menu"));
}

/// SeaBIOS's own account of what it found, through the debug console.
#[test]
fn seabios_finds_the_tables_and_the_processors_that_it_is_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let log_name = log.to_str().unwrap();
    let mut session =
        Session::start("bios-256k.bin", &["--cpus", "3", "--boot-menu", "0", "--debug-console", log_name]);
    session.expect("No bootable device.");
    drop(session);
    let text = std::fs::read_to_string(&log).unwrap();
    for found in ["Found 3 cpu(s)", "ACPI: parse DSDT", "Copying SMBIOS", "Found 1 PCI devices"] {
        assert!(text.contains(found), "no {found:?} in {text}");
    }
    assert!(!text.contains("internal error"), "{text}");
}

/// GRUB's first sector and the rest of it, with this menu and the modules for what the menu does.
fn grub(folder: &Path, menu: &str, more: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let [_, modules, tools, libraries @ ..] = packages() else { unreachable!("as many as their names") };
    let below = folder.join("disk/boot/grub");
    std::fs::create_dir_all(&below).unwrap();
    std::fs::write(below.join("grub.cfg"), menu).unwrap();
    let memdisk = folder.join("memdisk.tar");
    let mut archive = tar::Builder::new(std::fs::File::create(&memdisk).unwrap());
    archive.append_dir_all("boot", folder.join("disk/boot")).unwrap();
    archive.finish().unwrap();
    let core = folder.join("core.img");
    let places = ["lib/x86_64-linux-gnu", "lib"];
    let path = libraries.iter().flat_map(|package| places.map(|place| package.join(place)));
    let mut command = Command::new(tools.join("bin/grub-mkimage"));
    command.env("LD_LIBRARY_PATH", std::env::join_paths(path).unwrap());
    command.arg("-d").arg(modules.join("lib/grub/i386-pc")).arg("-m").arg(&memdisk).arg("-o").arg(&core);
    command.args(["-O", "i386-pc", "-p", "(memdisk)/boot/grub"]);
    command.args(["memdisk", "tar", "normal", "serial", "terminal", "echo"]).args(more);
    let output = run_within(&mut command, PATIENCE);
    assert!(output.status.success(), "{}", stderr(&output));
    let boot = std::fs::read(modules.join("lib/grub/i386-pc/boot.img")).unwrap();
    (boot, std::fs::read(&core).unwrap())
}

/// A diskette with GRUB.
fn grub_diskette(folder: &Path, (boot, core): (Vec<u8>, Vec<u8>)) -> PathBuf {
    let mut image = [boot, core].concat();
    assert!(image.len() <= DISKETTE);
    image.resize(DISKETTE, 0);
    let diskette = folder.join("diskette.img");
    std::fs::write(&diskette, image).unwrap();
    diskette
}

#[test]
fn grub_shows_its_menu_and_does_what_is_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let menu = "serial --unit=0\nterminal_input serial\nterminal_output serial\nset timeout=-1\n\
                menuentry 'The first entry' { echo wrong }\n\
                menuentry 'The second entry' { lsacpi; lsmmap; echo This was chosen.; sleep 1000 }\n";
    let diskette = grub_diskette(folder.path(), grub(folder.path(), menu, &["lsacpi", "lsmmap", "sleep"]));
    let file = format!("name=floppyimg/grub.img,file={}", diskette.display());
    let order = "name=bootorder,string=/rom@floppyimg/grub.img";
    let mut session =
        Session::start("bios-256k.bin", &["--boot-menu", "0", "--fw-cfg", &file, "--fw-cfg", order]);
    session.expect("Booting from Floppy");
    session.expect("GRUB");
    session.expect("The second entry");
    session.send(b"\x1b[B");
    session.expect("*The second entry");
    session.send(b"\r");
    session.expect("RINGSD");
    session.expect("base_addr = 0x100000");
    session.expect("This was chosen.");
}

/// A disk with GRUB before its one partition, which is an archive of these files.
fn grub_disk(folder: &Path, (boot, core): (Vec<u8>, Vec<u8>), files: &[(&str, PathBuf)]) -> PathBuf {
    const SECTOR: usize = 512;
    const FIRST: usize = 2048;
    /// Where the partition table begins.
    const TABLE: usize = 446;
    let mut archive = tar::Builder::new(Vec::new());
    for (name, path) in files {
        archive.append_path_with_name(path, name).unwrap();
    }
    let mut partition = archive.into_inner().unwrap();
    partition.resize(partition.len().next_multiple_of(SECTOR), 0);
    let mut image = boot;
    let sectors = (partition.len() / SECTOR) as u32;
    let entry = [&[0x80, 0, 0, 0, 0x83, 0, 0, 0][..], &(FIRST as u32).to_le_bytes(), &sectors.to_le_bytes()];
    image[TABLE..TABLE + 16].copy_from_slice(&entry.concat());
    image[TABLE + 16..510].fill(0);
    image.extend(core);
    assert!(image.len() <= FIRST * SECTOR);
    image.resize(FIRST * SECTOR, 0);
    image.extend(partition);
    let disk = folder.join("disk.img");
    std::fs::write(&disk, image).unwrap();
    disk
}

#[test]
fn grub_on_a_disk_boots_debian_which_finds_the_disk_and_random_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let menu = "serial --unit=0\nterminal_input serial\nterminal_output serial\nset timeout=0\n\
                menuentry 'Debian' { set root=(hd0,msdos1); linux /vmlinuz console=ttyS0 loglevel=4; initrd /initrd }\n";
    let modules = ["biosdisk", "part_msdos", "linux"];
    let files =
        [("vmlinuz", common::debian_file("vmlinuz")), ("initrd", common::debian_file("initramfs.cpio"))];
    let disk = grub_disk(folder.path(), grub(folder.path(), menu, &modules), &files);
    let disk = format!("path={},readonly=on,serial=RINGSIDE0", disk.display());
    let arguments = ["--memory", "512M", "--cpus", "2", "--boot-menu", "0", "--rng", "--disk", &disk];
    let mut session = Session::start("bios-256k.bin", &arguments);
    session.expect("Booting from Hard Disk");
    session.expect("root@ringside");
    session.send(
        b"cat /sys/bus/pci/devices/0000:00:0?.0/vendor | sort | uniq -c; dmesg | grep -c 'ACPI: DSDT'\n",
    );
    session.expect("2 0x1af4");
    session.send(b"echo $((6 * 7)) is the end\n");
    session.expect("42 is the end");
}

#[test]
fn what_is_no_disk_is_refused_before_the_guest_starts() {
    let folder = tempfile::tempdir().unwrap();
    let odd = folder.path().join("odd");
    std::fs::write(&odd, [0; 700]).unwrap();
    let image = folder.path().join("image");
    std::fs::write(&image, vec![0xf4; 65536]).unwrap();
    for (path, why) in
        [(folder.path(), "a directory"), (&odd, "no multiple of 512"), (Path::new("/none"), "/none")]
    {
        let mut command = ringside();
        command.args(["run", "--firmware"]).arg(&image).arg("--disk").arg(format!("path={}", path.display()));
        let output = run_within(&mut command, Duration::from_secs(20));
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(240), "{message}");
        assert!(message.contains(why) && message.contains("is no disk"), "{message}");
    }
}

#[test]
fn what_is_no_firmware_is_refused_before_the_guest_starts() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: usize| {
        let path = folder.path().join(name);
        std::fs::write(&path, vec![0x90; bytes]).unwrap();
        path
    };
    let cases = [
        (folder.path().to_owned(), "is a directory, not a file"),
        (file("empty", 0), "is empty"),
        (file("odd", 100_001), "100001 bytes, no multiple of 64 KiB"),
        (file("large", (8 << 20) + 65536), "more than the 8 MiB"),
        (folder.path().join("none"), "cannot read"),
    ];
    for (path, why) in cases {
        let output = run_within(ringside().args(["run", "--firmware"]).arg(&path), Duration::from_secs(20));
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(240), "{message}");
        assert!(message.contains(why) && message.contains(path.to_str().unwrap()), "{message}");
    }
}

#[test]
fn files_for_fw_cfg_that_cannot_be_are_refused_by_name() {
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), vec![0xf4; 65536]).unwrap();
    let long = format!("name={},string=x", "n".repeat(56));
    for (given, why) in [
        (vec!["name=opt/a,file=/nonexistent"], "/nonexistent"),
        (vec![long.as_str()], "1 to 55 bytes"),
        (vec!["name=opt/a,string=x", "name=opt/a,string=y"], "two files of the name"),
    ] {
        let mut command = ringside();
        command.args(["run", "--firmware"]).arg(image.path());
        for file in given {
            command.args(["--fw-cfg", file]);
        }
        let output = run_within(&mut command, Duration::from_secs(20));
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(240), "{message}");
        assert!(message.contains(why), "{message}");
    }
}
