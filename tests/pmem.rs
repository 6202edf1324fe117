//! Files as persistent memory: Linux's own driver and bare-metal code on them, and what becomes of the files.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::guest::{Guest, MEMORY};
use common::{debian_file, finish, ringside, run_within, stderr};
use iced_x86::code_asm::{byte_ptr, dword_ptr, dx, eax, ecx, ptr, qword_ptr, rax, rdi};
use sha2::{Digest, Sha256};

const LIMIT: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;
/// Where the first file is: above the RAM of small machines.
const FIRST: u64 = 4 << 30;

/// A file of so many bytes that are nowhere the same.
fn pattern(folder: &Path, bytes: u64) -> PathBuf {
    let path = folder.join("memory.img");
    let words = (0..bytes.div_ceil(4) as u32).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes());
    std::fs::write(&path, words.take(bytes as usize).collect::<Vec<u8>>()).unwrap();
    path
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn debian(arguments: &[&str], script: &str) -> Command {
    debian_file("vmlinux");
    let mut command = ringside();
    command.args(["run", "--engine", "soft"]).args(arguments).args(["--exec", script]);
    command
}

#[track_caller]
fn lines(output: &Output) -> Vec<String> {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn linux_reads_and_writes_a_file_on_both_transports_and_rings() {
    let folder = tempfile::tempdir().unwrap();
    let path = pattern(folder.path(), 16 * MIB);
    let option = path.to_str().unwrap();
    let script = "sha256sum < /dev/pmem0; cat /sys/block/pmem0/size; \
                  printf 'to be kept' | dd of=/dev/pmem0 bs=4096 seek=$SEEK conv=fsync 2>/dev/null && echo safe";
    let mut seek = 0;
    for transport in ["pci", "mmio"] {
        for features in ["packed=on", "packed=off", "packed=off,event-idx=off,indirect=off"] {
            let before = std::fs::read(&path).unwrap();
            let arguments = ["--pmem", option, "--transport", transport, "--virtio-features", features];
            seek += 7;
            let script = script.replace("$SEEK", &seek.to_string());
            let told = lines(&run_within(&mut debian(&arguments, &script), LIMIT));
            assert_eq!(
                told,
                [format!("{}  -", sum(&before)), "32768".into(), "safe".into()],
                "{arguments:?}"
            );
            let mut expected = before;
            expected[seek * 4096..][..10].copy_from_slice(b"to be kept");
            assert!(std::fs::read(&path).unwrap() == expected, "{arguments:?}");
        }
    }
}

#[test]
fn a_file_system_is_mounted_without_a_page_cache_and_programs_run_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new.img");
    let option = format!("path={},size=64M", path.display());
    let make = "set -e; mkfs.ext4 -q -b 4096 /dev/pmem0; modprobe ext4; mkdir /p
                mount -t ext4 -o dax /dev/pmem0 /p; grep -o dax=always /proc/mounts
                cp /bin/busybox /p/busybox; /p/busybox echo runs; sha256sum < /p/busybox; umount /p";
    let arguments = ["--package", "e2fsprogs", "--cpus", "2", "--pmem", &option];
    let made = lines(&run_within(&mut debian(&arguments, make), LIMIT));
    assert_eq!(made[..2], ["dax=always", "runs"], "{made:?}");
    let again = "set -e; e2fsck -fn /dev/pmem0 > /dev/null 2>&1; modprobe ext4; mkdir /p
                 mount -t ext4 -o dax /dev/pmem0 /p; sha256sum < /p/busybox";
    for transport in ["pci", "mmio"] {
        let option = format!("path={}", path.display());
        let arguments = ["--package", "e2fsprogs", "--transport", transport, "--pmem", &option];
        assert_eq!(lines(&run_within(&mut debian(&arguments, again), LIMIT)), made[2..], "{transport}");
    }
}

#[test]
fn what_is_read_only_or_a_snapshot_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = pattern(folder.path(), 3_000_001);
    let before = std::fs::read(&path).unwrap();
    let script = "head -c 3000001 /dev/pmem0 | sha256sum; cat /sys/block/pmem0/size
                  printf new | dd of=/dev/pmem0 conv=fsync 2>/dev/null && echo safe; head -c 3 /dev/pmem0";
    let option = |name: &str| format!("path={},{name}=on", path.display());
    let told = lines(&run_within(&mut debian(&["--pmem", &option("snapshot")], script), LIMIT));
    assert_eq!(told, [format!("{}  -", sum(&before)), "8192".into(), "safe".into(), "new".into()]);
    let output = run_within(&mut debian(&["--pmem", &option("readonly")], script), LIMIT);
    let told = lines(&output);
    assert_eq!(told[..2], [format!("{}  -", sum(&before)), "8192".into()]);
    assert!(!told.contains(&"safe".into()), "a store that is lost is called safe: {told:?}");
    assert!(stderr(&output).contains("it is read-only"), "{}", stderr(&output));
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn a_file_of_any_size_is_whole_and_keeps_its_size_where_nothing_is_added() {
    let folder = tempfile::tempdir().unwrap();
    for (size, blocks) in [(1, 4096), (4095, 4096), (2 * MIB, 4096), (3_000_001, 8192)] {
        let path = pattern(folder.path(), size);
        let before = std::fs::read(&path).unwrap();
        let script = format!("head -c {size} /dev/pmem0 | sha256sum; cat /sys/block/pmem0/size");
        let told = lines(&run_within(&mut debian(&["--pmem", path.to_str().unwrap()], &script), LIMIT));
        assert_eq!(told, [format!("{}  -", sum(&before)), blocks.to_string()], "{size}");
        assert!(std::fs::read(&path).unwrap() == before, "{size}");
    }
    let path = pattern(folder.path(), 5000);
    let script = "printf end | dd of=/dev/pmem0 bs=1 seek=2097149 conv=fsync 2> /dev/null";
    lines(&run_within(&mut debian(&["--pmem", path.to_str().unwrap()], script), LIMIT));
    let after = std::fs::read(&path).unwrap();
    assert_eq!((after.len() as u64, &after[2_097_149..]), (2 * MIB, &b"end"[..]), "what was added is there");
}

/// Starts a guest and waits until it has said a word on its standard output, which is a file.
fn start(command: &mut Command, output: &Path, word: &str) -> Child {
    let child = command.stdout(File::create(output).unwrap()).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + LIMIT;
    while !std::fs::read_to_string(output).unwrap().contains(word) {
        assert!(Instant::now() < until, "the guest never said {word:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    child
}

#[test]
fn a_file_that_is_cut_off_gives_the_guest_zeros_and_errors_and_the_user_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let path = pattern(folder.path(), 16 * MIB);
    let script =
        "echo ready; while [ \"$(head -c 15000000 /dev/pmem0 | tail -c 4096 | tr -d '\\000' | wc -c)\" != 0 ]
                  do sleep 1; done
                  printf new | dd of=/dev/pmem0 bs=1M seek=9 conv=fsync 2>/dev/null || echo refused
                  dd if=/dev/pmem0 bs=1M skip=9 count=1 2>/dev/null | head -c 3; echo; uname";
    let told = folder.path().join("told");
    let child = start(&mut debian(&["--pmem", path.to_str().unwrap()], script), &told, "ready");
    File::options().write(true).open(&path).unwrap().set_len(5 * MIB).unwrap();
    let output = finish(child, LIMIT);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        std::fs::read_to_string(&told).unwrap().split_whitespace().collect::<Vec<_>>(),
        ["ready", "refused", "new", "Linux"]
    );
    assert!(stderr(&output).contains("it was cut off"), "{}", stderr(&output));
    assert_eq!(path.metadata().unwrap().len(), 5 * MIB);
}

#[test]
fn two_machines_do_not_write_one_file_and_a_killed_one_leaves_it_usable() {
    let folder = tempfile::tempdir().unwrap();
    let path = pattern(folder.path(), 2 * MIB);
    let (option, told) = (path.to_str().unwrap(), folder.path().join("told"));
    let script = "printf kept | dd of=/dev/pmem0 conv=fsync 2>/dev/null; echo ready; sleep 1000";
    let mut child = start(&mut debian(&["--pmem", option], script), &told, "ready");
    for more in ["", ",readonly=on"] {
        let refused = run_within(&mut debian(&["--pmem", &format!("{option}{more}")], "true"), LIMIT);
        assert_eq!(refused.status.code(), Some(240));
        assert!(stderr(&refused).contains("another process"), "{}", stderr(&refused));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let told = lines(&run_within(&mut debian(&["--pmem", option], "head -c 4 /dev/pmem0"), LIMIT));
    assert_eq!(told, ["kept"]);
}

#[test]
fn what_cannot_be_memory_is_an_error_before_the_guest_starts() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let empty = folder.path().join("empty");
    File::create(&empty).unwrap();
    let large = folder.path().join("large");
    File::create(&large).unwrap().set_len(1 << 42).unwrap();
    let missing = folder.path().join("missing");
    for (path, why) in [
        (folder.path(), "a directory"),
        (&fifo, "a special file"),
        (Path::new("/dev/null"), "a special file"),
        (&empty, "it is empty"),
        (&missing, "No such file"),
        (&large, "no room"),
    ] {
        let mut command = debian(&["--cpu", "host,phys-bits=40", "--pmem", path.to_str().unwrap()], "true");
        let output = run_within(&mut command, LIMIT);
        assert_eq!(output.status.code(), Some(240), "{path:?}: {}", stderr(&output));
        assert!(
            stderr(&output).contains(why) && stderr(&output).contains(path.to_str().unwrap()),
            "{}",
            stderr(&output)
        );
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    }
    let mut many = ringside();
    many.args(["run", "--exec", "true"]);
    for number in 0..17 {
        let path = folder.path().join(format!("many-{number}"));
        File::create(&path).unwrap().set_len(2 * MIB).unwrap();
        many.arg("--pmem").arg(path);
    }
    assert!(stderr(&run_within(&mut many, LIMIT)).contains("at most 16"));
}

/// A guest that calls code in persistent memory often, changes it there, and calls it again; the sum is its exit value.
fn changing_code() -> Guest {
    const ROUNDS: u32 = 5000;
    /// The page-directory-pointer table of the loader, and a present, writable page of 1 GiB.
    const TABLE: i32 = 0xa000;
    const PAGE: u64 = 0x83;
    Guest::long(|a| {
        let (mut round, mut second) = (a.create_label(), a.create_label());
        a.mov(rax, FIRST | PAGE)?;
        a.mov(qword_ptr(TABLE + 4 * 8), rax)?;
        a.mov(rdi, FIRST)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut round)?;
        a.call(rdi)?;
        a.dec(ecx)?;
        a.jnz(round)?;
        // The immediate of `mov eax, 5`, behind its opcode.
        a.mov(dword_ptr(rdi + 1), 9)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut second)?;
        a.call(rdi)?;
        a.dec(ecx)?;
        a.jnz(second)?;
        a.mov(byte_ptr(rdi + 0x1000), 0x5a)?;
        a.mov(ptr(rdi + 0x1008), eax)?;
        a.mov(dx, 0xf4)?;
        a.out(dx, eax)?;
        a.hlt()
    })
}

#[test]
fn code_in_persistent_memory_is_executed_as_it_is_and_as_it_becomes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("code.img");
    // mov eax, 5; ret
    let code = b"\xb8\x05\0\0\0\xc3";
    for jit in ["on", "off", "lockstep"] {
        let file = File::create(&path).unwrap();
        file.set_len(2 * MIB).unwrap();
        file.write_all_at(code, 0).unwrap();
        let option = path.to_str().unwrap();
        let end = changing_code().run_with(&["--jit", jit, "--pmem", option]);
        assert!(end.message.contains("debug-exit port"), "{jit}: {end:?}");
        assert_eq!(end.status, Some(9), "{jit}: {end:?}");
        let after = std::fs::read(&path).unwrap();
        assert_eq!((after[1], after[0x1000], after[0x1008]), (9, 0x5a, 9), "{jit}, {MEMORY}");
    }
}

#[test]
fn stores_to_read_only_memory_are_discarded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("code.img");
    let mut bytes = vec![0; 2 * MIB as usize];
    bytes[..6].copy_from_slice(b"\xb8\x05\0\0\0\xc3");
    std::fs::write(&path, &bytes).unwrap();
    let option = format!("path={},readonly=on", path.display());
    for jit in ["on", "off"] {
        let end = changing_code().run_with(&["--jit", jit, "--pmem", &option]);
        assert_eq!(end.status, Some(5), "{jit}: {end:?}");
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
}
