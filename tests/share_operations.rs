//! Random operations on shared folders have the outcome that they have on the host, by either protocol, transport and
//! format of rings, run by root and by an ordinary user.
//!
//! `RINGSIDE_SEED` and `RINGSIDE_OPERATIONS` choose other operations, and more of them.

mod common;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use common::user::{OrdinaryUser, is_root, open_to_all};
use common::{debian_file, ringside, run_within, stderr};

const LIMIT: Duration = Duration::from_secs(300);

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

fn seed() -> u64 {
    number("RINGSIDE_SEED", 0x5eed)
}

fn operations() -> u64 {
    number("RINGSIDE_OPERATIONS", 1000)
}

#[track_caller]
fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    String::from_utf8_lossy(&output.stdout).replace('\r', "")
}

/// The programs for the guest, in a folder of their own.
fn programs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    open_to_all(folder.path());
    for name in ["random_files", "files"] {
        common::c_program::compile(name, &folder.path().join(name));
    }
    folder
}

/// What both sides call the program with, besides the folder.
fn arguments(seed: u64, kind: &str) -> String {
    format!("{seed} {}{}", operations(), if kind == "9p" { " 9p" } else { "" })
}

/// The outcome on the host.
fn native(programs: &Path, seed: u64, kind: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    // Others than root work there, too.
    open_to_all(folder.path());
    let mut command = Command::new(programs.join("random_files"));
    command.arg(folder.path()).args(arguments(seed, kind).split(' '));
    text(&run_within(&mut command, LIMIT))
}

/// Makes the guest's kernel as strict with links and pipes in folders of others as the host's is.
fn as_strict_as_the_host() -> String {
    ["hardlinks", "symlinks", "regular", "fifos"]
        .map(|name| {
            let file = format!("/proc/sys/fs/protected_{name}");
            let value = std::fs::read_to_string(&file).unwrap_or_default();
            format!("echo {} > {file}; ", value.trim())
        })
        .concat()
}

/// A run of the program in the guest on each of these shares, all at the same time; what each printed.
fn in_guest(
    mut command: Command,
    programs: &Path,
    shares: &[(&Path, &str, u64)],
    more: &[&str],
) -> Vec<String> {
    debian_file("vmlinux");
    command.args(["run", "--engine", "soft"]).args(more);
    command.arg("--share").arg(format!("{},tag=programs,readonly=on", programs.display()));
    let mut script = as_strict_as_the_host();
    for (index, (path, options, seed)) in shares.iter().enumerate() {
        let kind = if options.contains("9p") { "9p" } else { "fs" };
        command.arg("--share").arg(format!("{},tag=s{index},{options}", path.display()));
        let arguments = arguments(*seed, kind);
        script += &format!("/mnt/programs/random_files /mnt/s{index} {arguments} > /tmp/{index} & ");
    }
    script += "wait; ";
    for index in 0..shares.len() {
        script += &format!("cat /tmp/{index}; echo ====; ");
    }
    let output = text(&run_within(command.args(["--exec", &script]), LIMIT));
    output.split("====\n").take(shares.len()).map(str::to_owned).collect()
}

#[track_caller]
fn check_same(got: &str, expected: &str, what: &str) {
    for (got, expected) in got.lines().zip(expected.lines()) {
        assert_eq!(got, expected, "{what}, seed {}", seed());
    }
    assert_eq!(got.lines().count(), expected.lines().count(), "{what}");
    assert!(got.lines().count() as u64 > operations(), "{what}: {got}");
}

#[test]
fn random_operations_have_the_outcome_that_they_have_on_the_host() {
    let (programs, user) = (programs(), OrdinaryUser::new());
    let run = |command: Command, user: &OrdinaryUser, options: &str, more: &[&str]| {
        let (_folder, own) = user.own_folder();
        in_guest(command, programs.path(), &[(&own, options, seed())], more).remove(0)
    };
    let (by_fs, by_9p) =
        (run(user.ringside(), &user, "ids=kept", &[]), run(user.ringside(), &user, "ids=kept,as=9p", &[]));
    if !is_root() {
        eprintln!("skipped in part: on the host it takes root to give files away");
        assert!(by_fs.lines().count() as u64 > operations() && by_9p.lines().count() as u64 > operations());
        return;
    }
    let [fs, p9] = ["fs", "9p"].map(|kind| native(programs.path(), seed(), kind));
    check_same(&by_fs, &fs, "an ordinary user's virtio-fs");
    check_same(&by_9p, &p9, "an ordinary user's 9p");
    for (options, expected) in [
        ("as=fs", &fs),
        ("cache=none", &fs),
        ("cache=always", &fs),
        ("as=9p", &p9),
        ("as=9p,cache=always", &p9),
    ] {
        let folder = tempfile::tempdir().unwrap();
        open_to_all(folder.path());
        let got = in_guest(ringside(), programs.path(), &[(folder.path(), options, seed())], &[]);
        check_same(&got[0], expected, options);
    }
}

#[test]
fn several_folders_are_worked_in_at_once_over_each_transport_and_format_of_rings() {
    let programs = programs();
    let seeds = [1, 2, 3].map(|number| seed() + number);
    let kinds = ["fs", "9p", "fs"];
    let expected: Vec<_> = seeds
        .iter()
        .zip(kinds)
        .map(|(&seed, kind)| is_root().then(|| native(programs.path(), seed, kind)))
        .collect();
    for more in [
        &["--cpus", "4", "--transport", "mmio"][..],
        &["--cpus", "2", "--transport", "mmio", "--virtio-features", "packed=off"],
        &["--cpus", "4", "--virtio-features", "packed=off,event-idx=off"],
        &["--cpus", "2", "--virtio-features", "indirect=off"],
    ] {
        let folders: Vec<_> = kinds.iter().map(|_| tempfile::tempdir().unwrap()).collect();
        folders.iter().for_each(|folder| open_to_all(folder.path()));
        let options = ["as=fs,ids=kept", "as=9p,ids=kept", "cache=always,ids=kept"];
        let shares: Vec<_> = (0..3).map(|at| (folders[at].path(), options[at], seeds[at])).collect();
        let got = in_guest(ringside(), programs.path(), &shares, more);
        for (at, expected) in expected.iter().enumerate() {
            match expected {
                Some(expected) => check_same(&got[at], expected, &format!("{} with {more:?}", options[at])),
                None => assert!(got[at].lines().count() as u64 > operations(), "{}", got[at]),
            }
        }
    }
}

#[test]
fn an_ordinary_users_programs_do_with_files_what_roots_do_on_the_host() {
    let (programs, user) = (programs(), OrdinaryUser::new());
    let expected = is_root().then(|| {
        ["", "9p"].map(|kind| {
            let folder = tempfile::tempdir().unwrap();
            let mut command = Command::new(programs.path().join("files"));
            command.arg(folder.path()).args(kind.split_whitespace());
            text(&run_within(&mut command, LIMIT))
        })
    });
    for (index, kind) in ["fs", "9p"].into_iter().enumerate() {
        let (_folder, own) = user.own_folder();
        let mut command = user.ringside();
        command.args(["run", "--engine", "soft"]);
        command.arg("--share").arg(format!("{},tag=programs,readonly=on", programs.path().display()));
        command.arg("--share").arg(format!("{},as={kind},ids=kept", own.display()));
        let script = format!("/mnt/programs/files /mnt/share {}", if kind == "9p" { kind } else { "" });
        let got = text(&run_within(command.args(["--exec", &script]), LIMIT));
        let Some(expected) = expected.as_ref().map(|expected| &expected[index]) else {
            eprintln!("skipped in part: on the host it takes root to give files away");
            assert!(got.contains("names of 255"), "{got}");
            continue;
        };
        for (got, expected) in got.lines().zip(expected.lines()) {
            assert_eq!(got, expected, "{kind}");
        }
        assert_eq!(got.lines().count(), expected.lines().count(), "{kind}");
    }
}
