//! Fetching the default guest where something is in the way: no apt, a cache folder that cannot be written, a download
//! that is cut. Each ends soon, says what is wrong on stderr, and leaves nothing half done.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{finish, ringside, run_within, stderr};
use rustix::process::{Pid, Signal, kill_process, test_kill_process_group};

/// How long a failure that waits for nobody may take.
const SOON: Duration = Duration::from_secs(5);

/// What stands for apt: it knows two packages, and fails as `$FAILURE` says.
const FAKE_APT: &str = r#"#!/bin/sh
case "$FAILURE $*" in
    "update "*" update")
        echo "W: of no interest" >&2
        echo "E: Failed to fetch http://deb.example/InRelease  Connection refused" >&2
        exit 100 ;;
    "hang "*" update") echo $$ > "$RINGSIDE_CACHE/pid"; /bin/sleep 20; exit 1 ;;
    "killed "*" update") kill -9 $$ ;;
    *" update") exit 0 ;;
    "unknown "*" show "*) exit 0 ;;
    *" show linux-image-amd64")
        echo "Package: linux-image-amd64"
        echo "Version: 6.1"
        echo "Size: 1000"
        echo "SHA256: 00"
        echo "Depends: linux-image-6.1.0-1-amd64 (= 6.1)" ;;
    *" show "*)
        for name; do :; done
        echo "Package: $name"
        echo "Version: 6.1"
        echo "Size: 200000"
        echo "SHA256: 00" ;;
    "refused "*" download "*)
        echo "E: Hash Sum mismatch" >&2
        exit 100 ;;
    "cut "*" download "*) /usr/bin/head -c 1000 /dev/zero > linux-image-6.1.0-1-amd64_6.1_amd64.deb ;;
    "nothing "*" download "*) exit 0 ;;
    *" download "*)
        /usr/bin/head -c 200000 /dev/zero > linux-image-6.1.0-1-amd64_6.1_amd64.deb
        /usr/bin/head -c 200000 /dev/zero > busybox-static_6.1_amd64.deb ;;
esac
"#;

/// `ringside` that boots the default guest, with a cache folder of its own.
fn with_cache(folder: &Path) -> Command {
    let mut command = ringside();
    command.arg("run").env("RINGSIDE_CACHE", folder);
    command
}

/// What it says on its way to the documented end.
#[track_caller]
fn refused(command: &mut Command) -> String {
    let output = run_within(command, SOON);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(240), "{message}");
    assert_eq!(output.stdout, b"");
    assert!(!message.contains("panicked"), "{message}");
    message
}

/// The same with an apt that fails so.
fn with_fake_apt(failure: &str, cache: &Path, programs: &Path) -> Command {
    for name in ["apt-get", "apt-cache"] {
        let path = programs.join(name);
        std::fs::write(&path, FAKE_APT).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let mut command = with_cache(cache);
    command.env("PATH", programs).env("FAILURE", failure);
    command
}

/// Nothing but the lock is left.
#[track_caller]
fn is_clean(cache: &Path) {
    let entries = std::fs::read_dir(cache.join("guests")).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [".lock"]);
}

#[test]
fn without_apt_the_message_says_how_to_boot_a_kernel_of_ones_own() {
    let cache = tempfile::tempdir().unwrap();
    let message = refused(with_cache(cache.path()).env("PATH", "/nonexistent"));
    assert!(message.contains("apt") && message.contains("--kernel FILE"), "{message}");
    is_clean(cache.path());
}

#[test]
fn a_cache_folder_that_is_a_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cache");
    std::fs::write(&file, "mine").unwrap();
    let message = refused(&mut with_cache(&file));
    assert!(message.contains(file.to_str().unwrap()) && message.contains("Not a directory"), "{message}");
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
}

#[test]
fn without_a_home_the_message_says_which_variables_to_set() {
    let mut command = ringside();
    command.arg("run").env_remove("HOME").env_remove("XDG_CACHE_HOME").env("RINGSIDE_CACHE", "relative");
    let message = refused(&mut command);
    assert!(message.contains("RINGSIDE_CACHE") && message.contains("HOME"), "{message}");
}

/// Runs with the cache folder on a file system of its own, mounted with `options`; `None` where the host does not let
/// ordinary users mount.
fn mounted(options: &str, command: &Command) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let unshare = |script: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["-rm", "sh", "-c", script]).stdin(Stdio::null());
        unshare
    };
    if !unshare("mount -t tmpfs none /tmp").status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: no mounting here");
        return None;
    }
    let script =
        format!("mount -t tmpfs -o {options} none {} && exec \"$0\" \"$@\"", folder.path().display());
    let mut unshare = unshare(&script);
    unshare.arg(command.get_program()).args(command.get_args());
    unshare.env("RINGSIDE_CACHE", folder.path());
    for (name, value) in command.get_envs().filter(|(name, _)| *name != "RINGSIDE_CACHE" && *name != "PATH") {
        match value {
            Some(value) => unshare.env(name, value),
            None => unshare.env_remove(name),
        };
    }
    Some(refused(&mut unshare))
}

#[test]
fn a_cache_folder_that_is_read_only_is_named() {
    if let Some(message) = mounted("ro", &with_cache(Path::new(""))) {
        assert!(message.contains("/guests") && message.contains("Read-only file system"), "{message}");
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o555)).unwrap();
    // Root may write there all the same.
    if !rustix::process::geteuid().is_root() {
        let message = refused(&mut with_cache(folder.path()));
        assert!(message.contains("/guests") && message.contains("Permission denied"), "{message}");
    }
}

#[test]
fn a_cache_folder_that_is_full_is_named() {
    if let Some(message) = mounted("nr_inodes=2", &with_cache(Path::new(""))) {
        assert!(message.contains("/guests") && message.contains("No space left"), "{message}");
    }
    // Room for the folders, but not for what apt needs.
    if let Some(message) = mounted("nr_inodes=8", &with_cache(Path::new(""))) {
        assert!(message.contains("/guests") && message.contains("No space left"), "{message}");
    }
}

#[test]
fn what_apt_says_is_told_without_its_warnings() {
    let (cache, programs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (failure, expected) in [
        ("update", "E: Failed to fetch http://deb.example/InRelease  Connection refused"),
        ("refused", "E: Hash Sum mismatch"),
        ("killed", "signal: 9"),
        ("unknown", "linux-image-amd64"),
        ("nothing", "the file is not there"),
    ] {
        let message = refused(&mut with_fake_apt(failure, cache.path(), programs.path()));
        assert!(message.contains(expected) && !message.contains("W:"), "{failure}: {message}");
        is_clean(cache.path());
    }
}

#[test]
fn a_package_that_is_cut_or_is_none_is_named_and_not_kept() {
    let (cache, programs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let message = refused(&mut with_fake_apt("cut", cache.path(), programs.path()));
    assert!(message.contains("1000 bytes") && message.contains("200000"), "{message}");
    is_clean(cache.path());
    let message = refused(&mut with_fake_apt("garbage", cache.path(), programs.path()));
    assert!(message.contains("linux-image-6.1.0-1-amd64"), "{message}");
    is_clean(cache.path());
}

/// Waits for what happens soon.
#[track_caller]
fn soon<T>(what: &str, happens: impl Fn() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(it) = happens() {
            return it;
        }
        assert!(started.elapsed() < SOON, "not yet: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_fetch_that_hangs_ends_at_sigterm_with_apt_and_the_next_one_cleans_up() {
    let (cache, programs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut command = with_fake_apt("hang", cache.path(), programs.path());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let leader = || -> Option<i32> {
        std::fs::read_to_string(cache.path().join("pid")).ok()?.strip_suffix('\n')?.parse().ok()
    };
    let apt = Pid::from_raw(soon("apt starts", leader)).unwrap();
    let told = Instant::now();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = finish(child, SOON);
    assert!(told.elapsed() < Duration::from_secs(1), "{:?}", told.elapsed());
    assert_eq!(output.status.code(), Some(128 + 15));
    soon("apt and what it has started are gone", || test_kill_process_group(apt).is_err().then_some(()));
    refused(&mut with_fake_apt("update", cache.path(), programs.path()));
    is_clean(cache.path());
}

/// An archive that begins to answer and then hangs up.
fn cutting_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let cut = |mut stream: TcpStream| -> std::io::Result<()> {
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            let count = stream.read(&mut [0; 4096])?;
            if count > 0 {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nOrigin: Debian\n")?;
            }
            Ok(())
        };
        for stream in listener.incoming().flatten() {
            let _ = cut(stream);
        }
    });
    port
}

#[test]
fn a_download_that_is_cut_is_told_with_its_address() {
    if Command::new("apt-get").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("skipped: no apt here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let proxy = format!("http://127.0.0.1:{}/", cutting_server());
    let settings = folder.path().join("apt.conf");
    // Nothing of the system's settings, and no patience.
    let text = format!(
        "Dir::Etc::parts \"/nonexistent\";\nDir::Etc::main \"/dev/null\";\nAcquire::Retries \"0\";\n\
         Acquire::http::Proxy \"{proxy}\";\nAcquire::https::Proxy \"{proxy}\";\n"
    );
    std::fs::write(&settings, text).unwrap();
    let mut command = with_cache(folder.path());
    command.env("APT_CONFIG", &settings).env("http_proxy", &proxy).env("https_proxy", &proxy);
    let output = run_within(&mut command, Duration::from_secs(60));
    let message = stderr(&output);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(240), &b""[..]), "{message}");
    assert!(message.contains("E: ") && message.contains("InRelease"), "{message}");
    assert!(!folder.path().join("guests/debian").exists());
}
