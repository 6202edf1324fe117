//! Lockstep: Debian on the translator and the interpreter at once, compared after each block.

mod common;

use std::time::Duration;

use common::c_program::Programs;
use common::{debian_file, ringside, run_within, stderr};

const LIMIT: Duration = Duration::from_secs(900);

/// More than a boot: processes, pipes, floating point and a little of everything that a shell does.
const COMMAND: &str = "uname -s; awk 'BEGIN { for (i = 1; i < 2000; i++) s += sqrt(i) / i; printf \"%.6f\\n\", s }'; \
    seq 1 2000 | sort -r | sha256sum | cut -c 1-8; dd if=/dev/zero bs=64k count=4 2>/dev/null | gzip -c | gunzip -c | wc -c";

#[test]
fn debian_boots_and_works_in_lockstep() {
    debian_file("initramfs.cpio");
    let mut run = ringside();
    let output = run_within(run.args(["run", "--jit", "lockstep", "--stats", "--exec", COMMAND]), LIMIT);
    let report = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    let reference = run_within(ringside().args(["run", "--engine", "soft", "--exec", COMMAND]), LIMIT);
    assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&reference.stdout));
    assert!(output.stdout.starts_with(b"Linux\n"));
    let counter = |name: &str| -> u64 {
        let line = report.lines().find(|line| line.contains(name)).expect("a counter");
        line.split_whitespace().last().and_then(|number| number.parse().ok()).expect("a number")
    };
    assert!(counter("slices compared") > 10_000_000, "{report}");
    assert!(counter("blocks translated") > 1000, "{report}");
}

#[test]
fn devices_with_threads_of_their_own_work_in_lockstep() {
    debian_file("initramfs.cpio");
    let folder = tempfile::tempdir().unwrap();
    let (disk, shared) = (folder.path().join("a.img"), folder.path().join("shared"));
    let bytes: Vec<u8> = (0..4u32 << 20).map(|at| (at >> 3) as u8 ^ (at >> 11) as u8).collect();
    std::fs::write(&disk, &bytes).unwrap();
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("in"), &bytes[..300_000]).unwrap();
    let script = "mount -t virtiofs share /mnt && md5sum < /mnt/in && dd if=/dev/vda bs=64k count=16 2>/dev/null | md5sum; \
                  dd if=/mnt/in of=/dev/vda bs=4k seek=512 count=40 conv=fsync 2>/dev/null; \
                  dd if=/dev/vda of=/mnt/out bs=4k skip=512 count=40 iflag=direct 2>/dev/null; md5sum < /mnt/out";
    let run = |jit: &str| {
        let mut command = ringside();
        command
            .args(["run", "--engine", "soft", "--jit", jit, "--disk"])
            .arg(&disk)
            .arg("--share")
            .arg(&shared);
        let output = run_within(command.args(["--exec", script]), LIMIT);
        assert_eq!(output.status.code(), Some(0), "--jit {jit}: {}", stderr(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let compared = run("lockstep");
    assert_eq!(compared.lines().count(), 3, "{compared}");
    assert_eq!(compared, run("on"));
    assert!(std::fs::read(shared.join("out")).unwrap() == bytes[..40 * 4096]);
}

#[test]
fn what_devices_write_while_the_guest_looks_at_it_is_the_same_for_both() {
    const BYTES: usize = 16 * (16 << 10);
    // Where a device does not wait for its turn, a few hundred show it.
    const ROUNDS: usize = 1000;
    debian_file("vmlinux");
    let programs = Programs::new(&["reads_seen"]);
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("a.img");
    // No word that the guest looks at is zero.
    let bytes: Vec<u8> = (0..BYTES as u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8 | 1).collect();
    std::fs::write(&disk, &bytes).unwrap();
    let mut run = programs.run(&format!("/ringside/reads_seen /dev/vda {ROUNDS}"));
    let output = run_within(run.args(["--jit", "lockstep", "--disk"]).arg(&disk), LIMIT);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let mut hash = 0u64;
    for _ in 0..ROUNDS {
        for word in bytes.chunks_exact(8) {
            hash = hash.wrapping_mul(31).wrapping_add(u64::from_le_bytes(word.try_into().unwrap()));
        }
    }
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().last(), Some(&*format!("{hash:x}")));
}

#[test]
fn lockstep_is_refused_where_it_cannot_compare() {
    for arguments in [["--cpus", "2"], ["--engine", "kvm"]] {
        let output = run_within(ringside().args(["run", "--jit", "lockstep"]).args(arguments), LIMIT);
        assert_eq!(output.status.code(), Some(240), "{}", stderr(&output));
        assert!(stderr(&output).contains("--jit lockstep compares"), "{}", stderr(&output));
    }
}
