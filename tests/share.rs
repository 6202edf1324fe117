//! Folders of the host in Linux: what programs do there has the outcome that it has on the host, by either protocol, and
//! nothing leads out of the folder.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use common::c_program::Programs;
use common::{debian_file, ringside, run_within, stderr};

const LIMIT: Duration = Duration::from_secs(180);

fn debian(arguments: &[&str], script: &str) -> Output {
    debian_file("vmlinux");
    let mut command = ringside();
    command.args(["run", "--engine", "soft"]).args(arguments).args(["--exec", script]);
    run_within(&mut command, LIMIT)
}

#[track_caller]
fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Why Ringside refuses to start.
fn refusal(arguments: &[&str]) -> String {
    let output = run_within(ringside().args(["run", "--kernel", "/dev/null"]).args(arguments), LIMIT);
    assert!(!output.status.success() && output.stdout.is_empty());
    stderr(&output)
}

fn shared() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("shared")).unwrap();
    let path = folder.path().join("shared").to_string_lossy().into_owned();
    (folder, path)
}

/// All of a folder: names, kinds, sizes and contents.
fn tree(folder: &Path) -> Vec<String> {
    let mut list = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if meta.is_dir() {
            list.extend(tree(&path).into_iter().map(|below| format!("{name}/{below}")));
        } else if meta.is_file() {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let sum = bytes.iter().fold(1u32, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
            list.push(format!("{name}: file of {}, {sum}, {} links", meta.len(), meta.nlink()));
        } else {
            let link = std::fs::read_link(&path).unwrap_or_default();
            list.push(format!("{name}: {:?} {}", meta.file_type(), link.display()));
        }
    }
    list.sort();
    list
}

/// Runs the program on the host and in the guest; the folders of both.
fn compare(kind: &str, run: &[&str]) {
    let programs = Programs::new(&["files"]);
    let (_host_folder, host) = shared();
    let (_folder, guest) = shared();
    let native = Command::new(programs.native("files")).arg(&host).args(run).output().unwrap();
    let share = format!("{guest},as={kind}");
    let script = format!("/ringside/files /mnt/share {}", run.join(" "));
    let output = run_within(programs.run(&script).args(["--share", &share]), LIMIT);
    let (expected, got) = (text(&native), text(&output));
    for (expected, got) in expected.lines().zip(got.lines()) {
        assert_eq!(got, expected);
    }
    assert_eq!(got, expected);
    // A device is one on the host alone.
    let mut trees = [tree(Path::new(&host)), tree(Path::new(&guest))];
    for tree in &mut trees {
        tree.retain(|line| !line.starts_with("null"));
    }
    assert_eq!(trees[0], trees[1]);
}

#[test]
fn programs_do_with_files_over_virtio_fs_what_they_do_on_the_host() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: on the host it takes root to give files away");
        return;
    }
    compare("fs", &[]);
}

#[test]
fn programs_do_with_files_over_9p_what_they_do_on_the_host() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: on the host it takes root to give files away");
        return;
    }
    compare("9p", &["9p"]);
}

#[test]
fn the_guest_cannot_leave_the_folder() {
    for kind in ["fs", "9p"] {
        let (folder, path) = shared();
        std::fs::write(folder.path().join("secret"), "secret").unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret"), format!("{path}/link")).unwrap();
        std::os::unix::fs::symlink("../secret", format!("{path}/up")).unwrap();
        let pipe = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, format!("{path}/pipe"), pipe, 0o666.into(), 0).unwrap();
        // Where `../secret` leads is the guest's own folder.
        let script = "cd /mnt/share; cat link up ../secret ../../secret; echo no > up; ls -1A ..; \
                      ln up hard && cat hard; ls -1A; mknod disk b 254 0; chmod 6755 disk; \
                      cp /bin/busybox su; chmod 4755 su; ls -l su | cut -c1-10; ls -l disk | cut -c1-10; \
                      (echo out > pipe & cat pipe)";
        let output = debian(&["--share", &format!("{path},as={kind}")], script);
        assert_eq!(
            text(&output),
            "secret\nshare\nno\nhard\nlink\npipe\nup\n-rwsr-xr-x\nbrwsr-sr-x\nout\n",
            "{kind}: {}",
            stderr(&output)
        );
        assert_eq!(std::fs::read(folder.path().join("secret")).unwrap(), b"secret");
        let meta = |name: &str| std::fs::symlink_metadata(format!("{path}/{name}")).unwrap();
        assert!(meta("disk").is_file(), "no device on the host");
        assert_eq!(meta("su").permissions().mode() & 0o7777, 0o755, "no privileges on the host");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}

#[test]
fn several_folders_have_their_tags_and_read_only_ones_stay_as_they_are() {
    let (_one, one) = shared();
    let (_two, two) = shared();
    std::fs::write(format!("{one}/f"), "one").unwrap();
    std::fs::write(format!("{two}/f"), "two").unwrap();
    let (one, two) = (format!("{one},readonly=on"), format!("{two},tag=other,as=9p,readonly=on"));
    let script = "cat /mnt/share/f /mnt/other/f; cd /mnt; for d in share other; do \
                  mount -o remount,rw /mnt/$d 2>/dev/null; echo x > $d/f; rm $d/f; mkdir $d/d; done; cat share/f other/f";
    assert_eq!(text(&debian(&["--cpus", "2", "--share", &one, "--share", &two], script)), "onetwoonetwo");
}

#[test]
fn what_changes_on_the_host_is_seen_and_what_the_guest_writes_is_there() {
    let (_folder, path) = shared();
    std::fs::write(format!("{path}/f"), "before").unwrap();
    let script = "cd /mnt/share; cat f; touch ready; while [ ! -f go ]; do sleep 0.2; done; sleep 1.1; cat f; \
                  head -c 3000000 /dev/zero | tr '\\0' x > big; wc -c < big";
    debian_file("vmlinux");
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--share", &path, "--exec", script]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (ready, started) = (format!("{path}/ready"), std::time::Instant::now());
            while !Path::new(&ready).exists() && started.elapsed() < LIMIT {
                std::thread::sleep(Duration::from_millis(20));
            }
            std::fs::write(format!("{path}/f"), "behind its back").unwrap();
            std::fs::write(format!("{path}/go"), "").unwrap();
        });
        let output = run_within(&mut command, LIMIT);
        assert_eq!(text(&output), "beforebehind its back3000000\n");
    });
    assert!(std::fs::read(format!("{path}/big")).unwrap() == vec![b'x'; 3_000_000]);
}

/// A distribution: the guest's own busybox, and no more.
fn distribution(path: &str) {
    let script = "cp /bin/busybox /mnt/share/; cd /mnt/share; mkdir bin sbin etc; mv busybox bin; \
                  for name in sh ls cat mount echo rm; do ln -s busybox bin/$name; done; echo here > etc/name; \
                  printf '#!/bin/sh\\necho \"init $$\"; cat /etc/name; echo o > /proc/sysrq-trigger\\nwhile :; do :; done\\n' > sbin/init; \
                  chmod 755 sbin/init";
    text(&debian(&["--share", path], script));
}

#[test]
fn a_folder_is_the_root_file_system() {
    let (_folder, path) = shared();
    distribution(&path);
    for kind in ["fs", "9p"] {
        let root = format!("{path},as={kind}");
        let output = debian(&["--root", &root], "cat /etc/name; echo new > /etc/new; ls -1 /; exit 0");
        let text = text(&output);
        assert!(text.starts_with("here\nbin\ndev\n") && text.contains("\nproc\n"), "{text}");
        assert_eq!(std::fs::read(format!("{path}/etc/new")).unwrap(), b"new\n");
        std::fs::remove_file(format!("{path}/etc/new")).unwrap();
        let read_only = format!("{root},readonly=on");
        let script =
            "echo new > /etc/new && rm /etc/name && cat /etc/new; [ -f /etc/name ] || echo gone; exit 3";
        let output = debian(&["--root", &read_only], script);
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "new\ngone\n");
        assert!(
            !Path::new(&format!("{path}/etc/new")).exists()
                && Path::new(&format!("{path}/etc/name")).exists()
        );
    }
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--exits", "off", "--root", &path]);
    let output = run_within(&mut command, LIMIT);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("init 1\r\nhere"), "{text}\n{}", stderr(&output));
}

#[test]
fn what_cannot_be_shared_is_refused_before_the_guest_starts() {
    let (folder, path) = shared();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let file = file.to_string_lossy().into_owned();
    let long = format!("{path},tag={}", "t".repeat(32));
    let (one, two) = (format!("{path},tag=x"), format!("{path},tag=x,as=9p"));
    for (arguments, why) in [
        (vec!["--share", &*file], "not a folder"),
        (vec!["--share", "/nonexistent/folder"], "No such file"),
        (vec!["--share", "/dev/null"], "not a folder"),
        (vec!["--share", &long], "32 bytes: the most is 31"),
        (vec!["--share", &one, "--share", &two], "two shares have the tag \"x\""),
        (vec!["--share", ""], "needs a folder"),
    ] {
        let said = refusal(&arguments);
        assert!(said.contains(why), "{arguments:?}: {said}");
    }
    for (arguments, why) in [(&["--exec", "true"][..], "no /bin/sh to run"), (&[], "no /sbin/init")] {
        let output = run_within(ringside().args(["run", "--root", &path]).args(arguments), LIMIT);
        assert!(!output.status.success() && stderr(&output).contains(why), "{}", stderr(&output));
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0, "nothing is made there");
    }
    let output = run_within(ringside().args(["run", "--root", &file, "--exec", "true"]), LIMIT);
    assert!(!output.status.success() && stderr(&output).contains("not a folder"), "{}", stderr(&output));
}
