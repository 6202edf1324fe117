//! A disk with Debian, made as an ordinary user makes it and worked in: its packages run, what is written stays, and it
//! ends by itself.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::user::{OrdinaryUser, open_to_all};
use common::{finish, ringside, run_within, stderr};
use tempfile::TempDir;

/// Fetching the packages is in it, and a host that has other things to do.
const LIMIT: Duration = Duration::from_secs(1800);

fn on_disk(disk: &Path, arguments: &[&str]) -> Command {
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--exits", "off", "--disk"]);
    command.arg(format!("path={}", disk.display())).args(arguments);
    command
}

#[track_caller]
fn printed(disk: &Path, script: &str) -> String {
    let output = run_within(&mut on_disk(disk, &["--exec", script]), LIMIT);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Boots it, with these lines typed once it asks for a login.
fn session(disk: &Path, lines: &str) -> Output {
    let mut command = on_disk(disk, &["--cpus", "2"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(lines.as_bytes()).unwrap();
    drop(input);
    finish(child, LIMIT)
}

#[test]
fn a_disk_is_built_booted_to_a_login_and_worked_in() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.qcow2");
    let mut build = ringside();
    build.args([
        "guest",
        "build",
        "debian",
        "--hostname",
        "box7",
        "--package",
        "hello",
        "--size",
        "2G",
        "-o",
    ]);
    let built = run_within(build.arg(&disk), LIMIT);
    assert_eq!(built.status.code(), Some(0), "{}", stderr(&built));
    assert_eq!(disk::open(&disk::Options::reading(&disk)).unwrap().size(), 2 << 30);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");

    // Its packages are all installed and theirs are the programs, without its services.
    let script = "hello; hostname; dpkg-query -f '${db:Status-Abbrev}\\n' -W | sort -u; dpkg --audit; \
                  findmnt -rno FSTYPE,LABEL /; id -un; echo first > /root/kept";
    assert_eq!(printed(&disk, script), "Hello, world!\nbox7\nii \next4 ringside-root\nroot\n");

    // In a folder it is another system, which need not wait for the one on the disk.
    let user = OrdinaryUser::new();
    let folder = system_in_a_folder(&user, &disk);
    std::thread::scope(|scope| {
        scope.spawn(|| folder.map(|(_kept, own)| it_boots_from_a_folder(&user, &own)));
        it_is_booted_to_a_login_and_worked_in(&disk);
    });
}

fn it_is_booted_to_a_login_and_worked_in(disk: &Path) {
    // With them: it logs in by itself, nothing failed, and the input's end is the end of the run.
    let output = session(disk, "cat /root/kept; systemctl is-system-running; echo second >> /root/kept\n");
    let console = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{console}\n{}", stderr(&output));
    for part in ["box7 login: root (automatic login)", "first\r\n", "running\r\n", "Power down"] {
        assert!(console.contains(part), "no {part:?} in:\n{console}");
    }
    assert_eq!(printed(disk, "cat /root/kept"), "first\nsecond\n");

    // The shell beside it sees the disk and is not in it.
    let rescued = run_within(&mut on_disk(disk, &["--rescue", "--exec", "hostname; [ -b /dev/vda ]"]), LIMIT);
    assert_eq!(String::from_utf8_lossy(&rescued.stdout), "ringside\n");
    let packages = run_within(&mut on_disk(disk, &["--package", "hello"]), LIMIT);
    assert!(stderr(&packages).contains("--rescue"), "{}", stderr(&packages));
}

/// The same system in a folder of an ordinary user's, with all its owners.
fn system_in_a_folder(user: &OrdinaryUser, disk: &Path) -> Option<(TempDir, PathBuf)> {
    let (folder, own) = user.own_folder();
    let attribute = rustix::fs::setxattr(&own, "user.test", b"", rustix::fs::XattrFlags::empty());
    if attribute.is_err() {
        eprintln!("skipped: the host's folder for temporary files has no attributes of users");
        return None;
    }
    for path in [disk.parent().unwrap(), disk] {
        open_to_all(path);
    }
    let copy = "mkdir /d && modprobe ext4 && mount -t ext4 -o ro,noload /dev/vda /d && cp -a /d/. /mnt/share && \
                rm /mnt/share/etc/fstab && ls -ld /mnt/share/usr/bin/passwd | cut -c1-10";
    let mut command = user.ringside();
    command.args(["run", "--engine", "soft", "--exits", "off", "--rescue", "--memory", "1G", "--exec", copy]);
    command.arg("--disk").arg(format!("path={},readonly=on", disk.display()));
    let copied = run_within(command.arg("--share").arg(&own), LIMIT);
    assert_eq!(String::from_utf8_lossy(&copied.stdout), "-rwsr-xr-x\n", "{}", stderr(&copied));
    Some((folder, own))
}

/// It boots to a login, and works.
fn it_boots_from_a_folder(user: &OrdinaryUser, own: &Path) {
    let lines = "systemctl is-system-running --wait; stat -c %U:%G:%a /etc/shadow /usr/bin/su; hello; \
                 useradd -m ann; dpkg --audit; \
                 su ann -c 'cd; mkfifo p; ln -s /etc/shadow l; (echo through > p &) ; cat p; ls -l p l; cat l'\n";
    for kind in ["fs", "9p"] {
        let mut command = user.ringside();
        command.args(["run", "--engine", "soft", "--exits", "off", "--cpus", "2", "--root"]);
        command.arg(format!("{},as={kind}", own.display()));
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = finish(child, LIMIT);
        let console = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{kind}: {console}\n{}", stderr(&output));
        let parts = ["running\r\n", "root:shadow:640\r\nroot:root:4755\r\n", "Hello, world!", "through\r\n"];
        let others = ["p\r\n", " ann ann ", "Permission denied", "Power down"];
        for part in parts.into_iter().chain(others) {
            assert!(console.contains(part), "{kind}: no {part:?} in:\n{console}");
        }
    }
}

#[test]
fn what_cannot_be_built_is_said_and_nothing_is_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |arguments: &[&str]| {
        let mut build = ringside();
        build.args(["guest", "build", "debian"]).args(arguments).current_dir(folder.path());
        let output = run_within(&mut build, LIMIT);
        assert_ne!(output.status.code(), Some(0));
        assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
        stderr(&output)
    };
    std::fs::write(folder.path().join("there"), "kept").unwrap();
    assert!(refused(&["-o", "there"]).contains("--force"));
    assert_eq!(std::fs::read(folder.path().join("there")).unwrap(), b"kept");
    assert!(refused(&["-o", "."]).contains("is a folder"));
    assert!(refused(&["-o", "missing/disk.img"]).contains("missing"));
    assert!(refused(&["-o", "a", "--autologin", "off"]).contains("nobody could log in"));
    assert!(refused(&["-o", "a", "--password-file", "none"]).contains("none"));
    let unknown = refused(&["-o", "a", "--package", "no-such-package-at-all"]);
    assert!(unknown.contains("no-such-package-at-all"), "{unknown}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_signal_ends_a_build_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut build = ringside();
    build.args(["guest", "build", "debian", "-o", "disk.img"]).current_dir(folder.path());
    let mut child = build.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // Until the installation runs.
    let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("Installing") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut said, &mut line).unwrap() > 0, "it ended early");
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = finish(child, LIMIT);
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something is left behind");
}
