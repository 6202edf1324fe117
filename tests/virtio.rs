//! Linux's own drivers on the virtio devices: what they read is what the host has, what they write is there afterwards.

mod common;

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use common::{debian_file, ringside, run_within, stderr};
use sha2::{Digest, Sha256};

const LIMIT: Duration = Duration::from_secs(180);
/// Bytes of the tests' disks.
const SIZE: usize = 1 << 20;

/// Bytes that are nowhere the same.
fn pattern() -> Vec<u8> {
    (0..SIZE as u32 / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect()
}

fn disk(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("disk.img");
    std::fs::write(&path, pattern()).unwrap();
    path
}

fn debian(arguments: &[&str], script: &str) -> Output {
    debian_file("vmlinux");
    let mut command = ringside();
    command.args(["run", "--engine", "soft"]).args(arguments).args(["--exec", script]);
    run_within(&mut command, LIMIT)
}

#[track_caller]
fn lines(output: &Output) -> Vec<String> {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn a_disk_is_read_written_and_flushed_with_message_interrupts() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path());
    let option = format!("path={},serial=S-0815", path.display());
    let script = "sha256sum /dev/vda; cat /sys/block/vda/serial; echo; cat /sys/block/vda/ro; \
                  yes | head -c 8192 | dd of=/dev/vda bs=4096 seek=3 conv=fsync 2>/dev/null; \
                  grep -c 'PCI-MSI.*virtio' /proc/interrupts";
    let output = debian(&["--cpus", "2", "--disk", &option], script);
    let sum = Sha256::digest(pattern()).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(lines(&output), [format!("{sum}  /dev/vda"), "S-0815".into(), "0".into(), "3".into()]);
    let mut expected = pattern();
    expected[3 * 4096..5 * 4096].copy_from_slice(&b"y\n".repeat(4096));
    assert!(std::fs::read(&path).unwrap() == expected, "the image is not what the guest wrote");
}

#[test]
fn without_messages_the_interrupt_line_does() {
    let folder = tempfile::tempdir().unwrap();
    let option = format!("path={}", disk(folder.path()).display());
    let script = "sha256sum < /dev/vda; head -c 100 /dev/hwrng | wc -c; grep virtio /proc/interrupts";
    let output = debian(&["--rng", "--disk", &option, "--cmdline", "pci=nomsi"], script);
    let lines = lines(&output);
    let sum = Sha256::digest(pattern()).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(lines[..2], [format!("{sum}  -"), "100".into()]);
    assert_eq!(lines[2..].len(), 2, "{lines:?}");
    assert!(lines[2].starts_with("17:") && lines[3].starts_with("18:"), "{lines:?}");
    assert!(lines[2..].iter().all(|line| line.contains("fasteoi")), "{lines:?}");
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path());
    let option = format!("path={},readonly=on", path.display());
    let script =
        "cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null || echo refused";
    assert_eq!(lines(&debian(&["--disk", &option], script)), ["1", "refused"]);
    assert!(std::fs::read(&path).unwrap() == pattern());
}

#[test]
fn random_bytes_of_the_host_are_not_the_same_twice() {
    let output = debian(&["--rng"], "for i in 1 2; do head -c 32 /dev/hwrng | sha256sum; done");
    let lines = lines(&output);
    assert!(lines.len() == 2 && lines[0] != lines[1], "{lines:?}");
    let none = Sha256::digest([0; 32]).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(!lines.iter().any(|line| line.starts_with(&none)), "zeros");
}

#[test]
fn the_ledger_names_the_devices_registers() {
    let folder = tempfile::tempdir().unwrap();
    let option = format!("path={}", disk(folder.path()).display());
    let output = debian(&["--disk", &option, "--exits", "table"], "cat /dev/vda > /dev/null");
    let table = stderr(&output);
    assert!(table.contains("virtio-blk NOTIFY (w)"), "{table}");
}

#[test]
fn both_transports_and_rings_work_with_each_feature_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path());
    let option = format!("path={}", path.display());
    let sum = Sha256::digest(pattern()).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    // The bit that Linux shows as negotiated, from the left.
    let bits = [("packed", 34), ("event-idx", 29), ("indirect", 28)];
    let script = "sha256sum < /dev/vda; dd if=/dev/vda of=/tmp/copy bs=64k 2>/dev/null; \
                  dd if=/tmp/copy of=/dev/vda bs=4k conv=fsync 2>/dev/null; head -c 5000 /dev/hwrng | wc -c; \
                  cat /sys/block/vda/device/features; ls -l /sys/block/vda";
    for transport in ["pci", "mmio"] {
        for off in [&[][..], &["packed"], &["event-idx"], &["packed", "event-idx", "indirect"]] {
            let features: Vec<_> = off.iter().map(|name| format!("{name}=off")).collect();
            let mut arguments = vec!["--transport", transport, "--rng", "--disk", &option, "--cpus", "2"];
            let features = features.join(",");
            if !off.is_empty() {
                arguments.extend(["--virtio-features", &features]);
            }
            let lines = lines(&debian(&arguments, script));
            assert_eq!(lines[..2], [format!("{sum}  -"), "5000".into()], "{transport} {off:?}");
            for (name, bit) in bits {
                let on = lines[2].as_bytes()[bit] == b'1';
                assert_eq!(on, !off.contains(&name), "{transport} {off:?}: {name} in {}", lines[2]);
            }
            assert_eq!(lines[3].contains("LNRO0005"), transport == "mmio", "{}", lines[3]);
        }
    }
    assert!(std::fs::read(&path).unwrap() == pattern(), "the image changed");
}

/// What a guest does with one device of each kind; `$PORT` is the console's port.
const EACH_DEVICE: &str = "set -e
    sha256sum < /dev/vda
    sha256sum < /dev/pmem0
    dd if=/dev/vda of=/dev/pmem0 bs=4k conv=fsync 2> /dev/null && echo flushed
    head -c 5000 /dev/hwrng | wc -c
    for share in fs 9p; do cp /bin/busybox /mnt/$share/copy; sync; cmp /bin/busybox /mnt/$share/copy && echo $share; done
    head -c 300000 /dev/zero | socat -t 60 - VSOCK-CONNECT:2:80; echo
    for line in $(seq 100); do echo line $line; done > $(ls /dev/vport*p1)
    grep -c MemFree /proc/meminfo
    cat /sys/bus/virtio/devices/*/features";

/// A program of the host that counts what each connection sends.
fn count_at(path: &Path) {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let count = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
            std::io::Write::write_all(&mut stream, count.to_string().as_bytes()).unwrap();
        }
    });
}

#[test]
fn each_kind_of_device_works_on_both_transports_and_rings_with_each_feature_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (disk, memory) = (disk(folder.path()), at("memory"));
    for share in ["fs", "9p"] {
        std::fs::create_dir(at(share)).unwrap();
    }
    count_at(&folder.path().join("vm_80"));
    let sum =
        |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let options = [
        format!("--disk=path={}", disk.display()),
        format!("--pmem=path={memory}"),
        format!("--share={},tag=fs", at("fs")),
        format!("--share={},tag=9p,as=9p", at("9p")),
        format!("--vsock=cid=7,path={}", at("vm")),
        format!("--port=name=log,path={}", at("log")),
    ];
    let rings =
        ["packed=on", "packed=off", "event-idx=off", "indirect=off", "in-order=off", "notification-data=off"];
    for transport in ["pci", "mmio"] {
        for features in rings.into_iter().chain(["packed=off,event-idx=off,indirect=off"]) {
            let bytes = [pattern(), vec![7; SIZE]].concat();
            std::fs::write(&memory, &bytes).unwrap();
            let mut arguments = vec!["--transport", transport, "--virtio-features", features, "--cpus", "2"];
            arguments.extend(["--rng", "--console", "virtio", "--balloon", "size=32M", "--package", "socat"]);
            arguments.extend(options.iter().map(String::as_str));
            let lines = lines(&debian(&arguments, EACH_DEVICE));
            let (sums, told) = lines.split_at(2);
            assert_eq!(sums, [format!("{}  -", sum(&pattern())), format!("{}  -", sum(&bytes))]);
            let expected = ["flushed", "5000", "fs", "9p", "300000", "1"];
            assert_eq!(told[..6], expected, "{transport} {features}");
            assert_eq!(told[6..].len(), 8, "a device is missing: {transport} {features}");
            let packed = told[6..].iter().filter(|bits| bits.as_bytes()[34] == b'1').count();
            assert_eq!(packed, if features.contains("packed=off") { 0 } else { 8 }, "{transport} {features}");
            assert!(std::fs::read(&memory).unwrap().starts_with(&pattern()), "{transport} {features}");
            assert_eq!(std::fs::read_to_string(at("log")).unwrap().lines().count(), 100);
        }
    }
}

#[test]
fn a_kernel_without_acpi_is_told_of_devices_in_memory_by_its_command_line() {
    let output = debian(&["--transport", "mmio", "--rng", "--cmdline", "acpi=off"], "cat /proc/cmdline");
    let lines = lines(&output);
    assert!(lines[0].ends_with(" virtio_mmio.device=0x200@0xfec10000:5"), "{lines:?}");
}

/// What `ringside balloon` says of one thing, in bytes; `None` while nobody answers.
fn balloon(socket: &Path, size: Option<&str>, name: &str) -> Option<u64> {
    let output = ringside().arg("balloon").arg(socket).args(size).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let value = text.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned();
    let (number, unit) = value.split_once(' ')?;
    let unit = match unit {
        "GiB" => 1 << 30,
        "MiB" => 1 << 20,
        "KiB" => 1 << 10,
        _ => 1,
    };
    Some((number.parse::<f64>().ok()? * f64::from(unit)) as u64)
}

fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let limit = std::time::Instant::now() + LIMIT;
    while !there() {
        assert!(std::time::Instant::now() < limit, "{what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Bytes of a process that are in the host's memory.
fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn a_balloon_takes_memory_gives_it_back_and_what_is_free_goes_to_the_host() {
    debian_file("vmlinux");
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("balloon");
    for transport in ["pci", "mmio"] {
        let option = format!("size=64M,control={}", socket.display());
        let script = "dd if=/dev/zero of=/x bs=1M count=200 2>/dev/null; sleep 2; rm /x; sleep 1000";
        let mut command = ringside();
        command.args(["run", "--engine", "soft", "--transport", transport, "--balloon", &option]);
        let mut child = command.args(["--exec", script]).spawn().unwrap();
        let mut most = 0;
        wait_for("the guest does not give what it does not use", || {
            most = most.max(resident(child.id()));
            balloon(&socket, None, "given-back").is_some_and(|bytes| bytes > 260 << 20)
                && most > resident(child.id()) + (100 << 20)
        });
        assert_eq!(balloon(&socket, None, "actual"), Some(64 << 20));
        assert!(balloon(&socket, None, "total").is_some_and(|bytes| bytes > 300 << 20));
        assert_eq!(balloon(&socket, Some("8M"), "target"), Some(8 << 20));
        wait_for("the balloon stays", || balloon(&socket, None, "actual") == Some(8 << 20));
        child.kill().unwrap();
        child.wait().unwrap();
        // Nobody was there to remove the socket: the next machine replaces it.
        assert!(socket.exists());
    }
}

#[test]
fn ports_have_their_names_and_lead_where_they_should() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out");
    let port = format!("name=org.example.log,path={}", file.display());
    let script = "cat /sys/class/virtio-ports/*/name; echo to the host > /dev/vport0p0; cat /proc/consoles";
    for features in ["packed=on", "packed=off"] {
        let output = debian(&["--port", &port, "--virtio-features", features], script);
        assert_eq!(lines(&output)[0], "org.example.log");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "to the host\n");
    }
}

/// The guest's terminal is there some time before anyone has it open: slower processors make that time longer.
#[test]
fn a_script_on_standard_input_runs_on_the_virtio_console() {
    debian_file("vmlinux");
    for how in [&["--cpus", "1"], &["--cpus", "2"], &["--jit", "off"]] {
        let mut command = ringside();
        command.args(["run", "--engine", "soft", "--console", "virtio", "--exits", "off"]).args(how);
        let mut child = command
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, b"tty; echo $((6 * 7))!\n").unwrap();
        drop(stdin);
        let output = common::finish(child, LIMIT);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{how:?}: {text}");
        assert!(text.contains("/dev/hvc0") && text.contains("42!"), "{how:?}: {text}");
    }
}
