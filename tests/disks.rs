//! Disks of whole machines: which images are refused, what `ringside disk` does, what a guest's disk keeps when Ringside is
//! killed and when the host has no space.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use common::{KernelFile, debian_file, ringside, run_within, stderr};

const LIMIT: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(20);
/// Code that powers off: mov dx, 0x604; mov ax, 0x3400; out dx, ax.
const POWER_OFF: &[u8] = b"\x66\xba\x04\x06\x66\xb8\x00\x34\x66\xef\xeb\xfe";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn disk(arguments: &[&str]) -> Output {
    run_within(ringside().arg("disk").args(arguments), SOON)
}

/// `ringside disk` succeeds; its standard output.
#[track_caller]
fn done(arguments: &[&str]) -> String {
    let output = disk(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A command is refused in one line that has `why`.
#[track_caller]
fn refused(output: &Output, why: &str) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(240), "{said}");
    assert!(said.contains(why) && said.lines().count() == 1, "no {why:?} in {said:?}");
    assert_eq!(output.stdout, b"");
}

#[test]
fn images_that_cannot_be_disks_are_refused_before_the_guest_starts() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let kernel = KernelFile::with_code(POWER_OFF);
    let run = |option: &str| {
        let kernel = kernel.path();
        let arguments = ["run", "--engine", "soft", "--kernel", text(&kernel), "--disk", option];
        run_within(ringside().args(arguments), SOON)
    };
    done(&["create", text(&path("good.qcow2")), "1M"]);
    let good = std::fs::read(path("good.qcow2")).unwrap();
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(path("bad.qcow2"), image).unwrap();
        run(text(&path("bad.qcow2")))
    };
    refused(&changed(32, &[0, 0, 0, 1]), "encrypted");
    refused(&changed(36, &[0xff; 4]), "level 1 table");
    refused(&changed(100, &[0xff; 4]), "header is damaged");
    std::fs::write(path("cut.qcow2"), &good[..70]).unwrap();
    refused(&run(text(&path("cut.qcow2"))), "truncated");
    std::fs::write(path("a\nb.img"), [0; 100]).unwrap();
    refused(&run(text(&path("a\nb.img"))), "a\\nb.img is no disk: it has 100 bytes");
    refused(&run(text(folder.path())), "a directory");
    refused(&run("/dev/null"), "a special file");
    refused(&run("/nonexistent.img"), "No such file");
    // Each of two images has the other below it.
    done(&["create", "--backing", "good.qcow2", text(&path("one.qcow2"))]);
    done(&["create", "--backing", "one.qcow2", text(&path("two.qcow2"))]);
    std::fs::rename(path("two.qcow2"), path("good.qcow2")).unwrap();
    refused(&run(text(&path("one.qcow2"))), "circle");
}

#[test]
fn disk_commands_create_convert_resize_and_tell() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (raw, qcow2) = (path("a.img"), path("a.qcow2"));
    let bytes: Vec<u8> =
        (0..2u32 << 20).map(|at| if at % 0x40000 < 0x10000 { at as u8 } else { 0 }).collect();
    std::fs::write(&raw, &bytes).unwrap();
    done(&["convert", text(&raw), text(&qcow2)]);
    done(&["convert", text(&qcow2), text(&path("b.img"))]);
    assert!(std::fs::read(path("b.img")).unwrap() == bytes);
    let json: serde_json::Value = serde_json::from_str(&done(&["info", "--json", text(&qcow2)])).unwrap();
    assert_eq!(
        (&json["files"][0]["format"], &json["files"][0]["size"]),
        (&"qcow2".into(), &(2 << 20).into())
    );
    assert!(done(&["info", text(&raw)]).contains("2 MiB (2097152 bytes)"));
    done(&["resize", text(&qcow2), "+1M"]);
    refused(&disk(&["resize", text(&qcow2), "1M"]), "--shrink");
    assert!(done(&["info", text(&qcow2)]).contains("3 MiB"));
    let again = disk(&["convert", text(&raw), text(&qcow2)]);
    assert!(again.status.code() == Some(240) && stderr(&again).contains("--force"), "{}", stderr(&again));
    assert_eq!(done(&["check", text(&qcow2)]).lines().next(), Some("no errors, no lost space"));
    refused(&disk(&["check", text(&raw)]), "no qcow2 image");
    // A refcount that is one too high, and one that is too low.
    let mut image = std::fs::read(&qcow2).unwrap();
    image[(2 << 16) + 11] = 0;
    std::fs::write(&qcow2, &image).unwrap();
    assert_eq!(disk(&["check", text(&qcow2)]).status.code(), Some(2));
    image[(2 << 16) + 11] = 1;
    image[(2 << 16) + 2000] = 1;
    std::fs::write(&qcow2, &image).unwrap();
    assert_eq!(disk(&["check", text(&qcow2)]).status.code(), Some(3));
    assert!(done(&["check", "--repair", text(&qcow2)]).contains("repaired"));
    assert_eq!(disk(&["create", text(&path("c.img"))]).status.code(), Some(2), "without a size");
    assert_eq!(disk(&["create", text(&path("c.img")), "12Q"]).status.code(), Some(2));
}

fn debian(arguments: &[&str], script: &str) -> Vec<String> {
    debian_file("vmlinux");
    let mut command = ringside();
    command.args(["run", "--engine", "soft"]).args(arguments).args(["--exec", script]);
    let output = run_within(&mut command, LIMIT);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn a_guest_keeps_its_data_in_qcow2_and_forgets_a_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("a.qcow2");
    done(&["create", text(&image), "64M"]);
    let write = "yes ringside | head -c 3000000 | dd of=/dev/vda bs=64k seek=100 conv=fsync 2>/dev/null; \
                 ls /sys/block/vda/mq | wc -l; cat /sys/block/vda/queue/write_cache; \
                 [ $(cat /sys/block/vda/queue/discard_max_bytes) -gt 0 ] && echo discards";
    let lines = debian(&["--cpus", "2", "--disk", text(&image)], write);
    assert_eq!(lines, ["2", "write back", "discards"]);
    let sum = "dd if=/dev/vda bs=64k skip=100 2>/dev/null | head -c 3000000 | md5sum";
    let kept = debian(&["--disk", text(&image)], sum);
    let snapshot = format!("path={},snapshot=on", text(&image));
    let script = format!("dd if=/dev/zero of=/dev/vda bs=64k count=200 conv=fsync 2>/dev/null; {sum}");
    let zeros = debian(&["--disk", &snapshot], &script);
    assert_ne!(zeros, kept);
    assert_eq!(debian(&["--disk", text(&image)], sum), kept);
    assert!(done(&["check", text(&image)]).starts_with("no errors"));
}

/// Kills Ringside while its guest writes and syncs; gives the last block that it said to be durable.
fn killed_while_writing(image: &Path, blocks: usize) -> usize {
    debian_file("vmlinux");
    let script = "i=0; while :; do yes \"block $i\" | head -c 4096 | \
                  dd of=/dev/vda bs=4096 seek=$((i * 37 % 4096)) conv=notrunc,fsync 2>/dev/null && echo $i; \
                  i=$((i + 1)); done";
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--disk", text(image), "--exec", script]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let started = Instant::now();
    let mut last = None;
    while last.is_none_or(|last| last < blocks) {
        last = lines.next().and_then(|line| line.ok()?.trim().parse().ok());
        assert!(last.is_some() && started.elapsed() < LIMIT, "the guest writes");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What it said and we did not read yet counts, too.
    lines.map_while(Result::ok).filter_map(|line| line.trim().parse().ok()).last().or(last).unwrap()
}

#[test]
fn what_was_synced_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..kill_rounds(2) {
        let name = if round % 2 == 0 { "a.qcow2" } else { "a.img" };
        let image = folder.path().join(name);
        done(&["create", "--force", text(&image), "16M"]);
        let last = killed_while_writing(&image, 5 + 13 * round % 60);
        if round % 2 == 0 {
            done(&["check", "--repair", text(&image)]);
        }
        let raw = folder.path().join("raw.img");
        done(&["convert", "--force", text(&image), text(&raw)]);
        let bytes = std::fs::read(&raw).unwrap();
        for block in (0..=last).rev().take(4096) {
            let expected = format!("block {block}\n").repeat(700);
            let at = block * 37 % 4096 * 4096;
            assert!(
                bytes[at..at + 4096] == expected.as_bytes()[..4096],
                "round {round}: block {block} of {last} is lost"
            );
        }
    }
}

/// Rounds of the tests that kill: more by hand, with `RINGSIDE_KILL_ROUNDS`.
fn kill_rounds(default: usize) -> usize {
    std::env::var("RINGSIDE_KILL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(default)
}

/// A guest with fio and a file system's tools on a disk; the machine's options take turns from round to round.
fn storage_guest(image: &Path, round: usize, script: &str) -> std::process::Command {
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--package", "fio,e2fsprogs", "--disk", text(image)]);
    if round % 4 >= 2 {
        command.args(["--transport", "mmio"]);
    }
    if round.is_multiple_of(3) {
        command.args(["--virtio-features", "packed=off"]);
    }
    if round % 5 == 4 {
        command.args(["--cpus", "2"]);
    }
    command.args(["--exec", script]);
    command
}

/// A job of fio's that writes blocks which it can verify.
fn verified_job(name: &str, more: &str) -> String {
    format!(
        "fio --name={name} --filename=/mnt/{name} --rw=randwrite --bs=4k --size=4M --ioengine=libaio --iodepth=8 \
         --randseed=7 --verify=crc32c {more}"
    )
}

/// Kills Ringside in the middle of fio, after so many of the log's records were said to be durable; how many were.
fn killed_in_fio(image: &Path, round: usize, records: usize) -> usize {
    let script = format!(
        "mount -t ext4 /dev/vda /mnt && {} >/dev/null && echo settled || exit 9\n{} >/dev/null 2>&1 &\n\
         i=0; while :; do printf '%015d\\n' $i | dd of=/mnt/log bs=16 seek=$i conv=notrunc,fsync 2>/dev/null && echo $i; \
         i=$((i + 1)); done",
        verified_job("settled", "--do_verify=0 --end_fsync=1"),
        verified_job("busy", "--fsync=4 --time_based --runtime=600"),
    );
    let mut child = storage_guest(image, round, &script).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().expect("a line").unwrap().trim(), "settled");
    let mut last = 0;
    while last < records {
        last = lines.next().and_then(|line| line.ok()?.trim().parse().ok()).expect("the guest writes");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What it said and we did not read yet counts, too.
    lines.map_while(Result::ok).filter_map(|line| line.trim().parse().ok()).last().unwrap_or(last) + 1
}

#[test]
fn a_file_system_and_all_that_was_synced_survive_kills_in_the_middle_of_fio() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..kill_rounds(4) {
        let image = folder.path().join(if round % 2 == 0 { "a.qcow2" } else { "a.img" });
        if round < 2 {
            done(&["create", text(&image), "64M"]);
            let made = run_within(&mut storage_guest(&image, 0, "mke2fs -q -F -t ext4 /dev/vda"), LIMIT);
            assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
        }
        let records = killed_in_fio(&image, round, 3 + 17 * round % 50);
        let verify = format!(
            "e2fsck -p /dev/vda > /dev/null; [ $? -le 1 ] || echo journal; e2fsck -f -n /dev/vda > /tmp/fsck || cat /tmp/fsck; \
             mount -t ext4 /dev/vda /mnt; {} > /tmp/fio || cat /tmp/fio; head -c {} /mnt/log; umount /mnt",
            verified_job("settled", "--verify_only"),
            records * 16
        );
        let output = run_within(&mut storage_guest(&image, round, &verify), LIMIT);
        let expected: String = (0..records).map(|record| format!("{record:015}\n")).collect();
        let found = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        assert!(found == expected, "round {round}, {records} records: {found}{}", stderr(&output));
        if round % 2 == 0 {
            assert!(done(&["check", text(&image)]).starts_with("no errors"), "round {round}");
        }
    }
}

#[test]
fn a_host_without_space_makes_the_guest_wait_until_there_is_some() {
    debian_file("vmlinux");
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("a.img");
    done(&["create", text(&image), "64M"]);
    let script = "echo ready; sleep 2; \
                  yes ringside | head -c 4000000 | dd of=/dev/vda bs=4k seek=1024 conv=fsync 2>/dev/null && echo written";
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--disk", text(&image), "--exec", script]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut ready = String::new();
    stdout.read_line(&mut ready).unwrap();
    assert_eq!(ready.trim(), "ready");
    // A limit on the size of files stands for a full file system.
    let pid = rustix::process::Pid::from_raw(child.id() as i32);
    let limit = |bytes| {
        let limit = rustix::process::Rlimit { current: bytes, maximum: None };
        rustix::process::prlimit(pid, rustix::process::Resource::Fsize, limit).unwrap();
    };
    limit(Some(4 << 20));
    let mut errors = BufReader::new(child.stderr.take().unwrap()).lines();
    let said = errors.next().expect("a message").unwrap();
    assert!(said.contains("no space") && said.contains("the guest waits"), "{said}");
    limit(None);
    let mut output = String::new();
    stdout.read_to_string(&mut output).unwrap();
    assert!(child.wait().unwrap().success() && output.contains("written"), "{output}");
    assert!(errors.map_while(Result::ok).any(|line| line.contains("goes on")));
    let bytes = std::fs::read(&image).unwrap();
    let expected = "ringside\n".repeat(500_000);
    assert!(bytes[4 << 20..][..4_000_000] == expected.as_bytes()[..4_000_000]);
}
