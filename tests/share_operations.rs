//! Random operations on shared folders have the outcome that they have on the host, by either protocol, transport and
//! format of rings, run by root and by an ordinary user.
//!
//! `RINGSIDE_SEED` and `RINGSIDE_OPERATIONS` choose other operations, and more of them.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
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
    let kind = if kind == "fs" { String::new() } else { format!(" {kind}") };
    format!("{seed} {}{kind}", operations())
}

/// Which operations a share with these options is to have.
fn kind_of(options: &str) -> &'static str {
    if options.contains("9p") { "9p" } else { "fs" }
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

/// A run of the program in the guest on each of these shares, which have a folder, options, a kind of operations and a
/// seed; all at the same time. What each printed.
fn in_guest(
    mut command: Command,
    programs: &Path,
    shares: &[(&Path, &str, &str, u64)],
    more: &[&str],
) -> Vec<String> {
    debian_file("vmlinux");
    command.args(["run", "--engine", "soft"]).args(more);
    command.arg("--share").arg(format!("{},tag=programs,readonly=on", programs.display()));
    let mut script = as_strict_as_the_host();
    for (index, (path, options, kind, seed)) in shares.iter().enumerate() {
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
        in_guest(command, programs.path(), &[(&own, options, kind_of(options), seed())], more).remove(0)
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
        let share = (folder.path(), options, kind_of(options), seed());
        let got = in_guest(ringside(), programs.path(), &[share], &[]);
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
        let shares: Vec<_> =
            (0..3).map(|at| (folders[at].path(), options[at], kinds[at], seeds[at])).collect();
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
fn access_control_lists_have_the_effect_that_they_have_on_the_host() {
    let programs = programs();
    let expected = is_root().then(|| native(programs.path(), seed(), "lists"));
    let options = ["as=fs", "cache=none", "cache=always,ids=kept"];
    let folders = options.map(|_| tempfile::tempdir().unwrap());
    folders.iter().for_each(|folder| open_to_all(folder.path()));
    let shares = std::array::from_fn::<_, 3, _>(|at| (folders[at].path(), options[at], "lists", seed()));
    let got = in_guest(ringside(), programs.path(), &shares, &["--cpus", "2"]);
    let Some(expected) = expected else {
        eprintln!("skipped in part: an ordinary user's share has no lists");
        assert!(got[0].contains("posix_acl_access") || got[0].contains("= EOPNOTSUPP"), "{}", got[0]);
        return;
    };
    if !expected.lines().any(|line| {
        line.starts_with(|c: char| c.is_ascii_digit()) && line.contains("_default") && line.contains("= 0")
    }) {
        eprintln!("skipped: the file system of {} has no lists", folders[0].path().display());
        return;
    }
    got.iter().zip(options).for_each(|(got, options)| check_same(got, &expected, options));
}

/// What `setfacl` and `getfacl` do in a folder. Numbers of users and groups have no names.
const LISTS: &str = r#"umask 027; mkdir d f && cd d && touch a && chmod 640 a
    setfacl -m u:1234:rw,g:50:r,m::rwx a && getfacl -n a; stat -c %a a; chmod 600 a; getfacl -n a; chmod g=rx a; getfacl -n a
    setfacl -x u:1234 a; getfacl -n a; setfacl -b a; getfacl -n a; stat -c %a a
    setfacl -d -m u:1234:rwx,g::rx,o::- . && getfacl -n .; touch b; mkdir e; mknod p p; getfacl -n b e p; stat -c %a b e p
    setfacl -k .; mkdir g; touch h; getfacl -n . g h; stat -c %a g h
    setfacl -m u:1234:--x,u:77:rwx ../f; cp -a ../f ../f2; getfacl -n ../f2; chown 5:6 ../f2; getfacl -n ../f2; ls -ld ../f2 | cut -c 1-11
    echo secret > s; chmod 600 s; setfacl -m u:1234:r s; setfacl -m u:1234:x .; chmod 711 ..
    setpriv --reuid 1234 --regid 1234 --clear-groups cat s; setpriv --reuid 1235 --regid 1235 --clear-groups cat s
    setfacl -m u:1234:w s; setpriv --reuid 1234 --regid 1234 --clear-groups cat s
    touch sg; chgrp 50 sg; chmod 2755 sg; setfacl -m g:7:rx sg; stat -c %a sg; ln -s a l; setfacl -m u:9:r l; getfacl -n l
    setfacl -m u:9:q a; getfattr -m - -d a 2>/dev/null; setfacl --set u::rw,u:3:r,g::r,o::r a
    getfacl -nR . | setfacl --restore=- ; getfacl -nR . | sort | md5sum"#;

#[test]
fn setfacl_and_getfacl_do_what_they_do_on_linuxs_own_file_system() {
    debian_file("vmlinux");
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let mut command = ringside();
    command.args(["run", "--engine", "soft"]);
    for package in ["acl", "attr", "util-linux"] {
        command.args(["--package", package]);
    }
    for (folder, options) in folders.iter().zip(["tag=fs", "tag=p9,as=9p"]) {
        open_to_all(folder.path());
        command.arg("--share").arg(format!("{},{options}", folder.path().display()));
    }
    let script = format!(
        "umount /mnt/p9 && mount -t 9p -o trans=virtio,version=9p2000.L,posixacl p9 /mnt/p9 || exit 9
        mkdir /mnt/own && mount -t tmpfs own /mnt/own || exit 9
        for at in /mnt/own /mnt/fs /mnt/p9; do (cd $at; {LISTS}) > /tmp/out 2>&1; cat /tmp/out; echo ====; done"
    );
    let output = text(&run_within(command.args(["--exec", &script]), Duration::from_secs(900)));
    let parts: Vec<_> = output.split("====\n").collect();
    assert!(parts[0].contains("user:1234:rw-") && parts[0].contains("secret"), "{}", parts[0]);
    if !is_root() {
        eprintln!("skipped in part: an ordinary user's share has no lists");
        assert!(parts[1].contains("Operation not supported"), "{}", parts[1]);
        return;
    }
    for (part, what) in parts[1..3].iter().zip(["virtio-fs", "9p"]) {
        for (got, expected) in part.lines().zip(parts[0].lines()) {
            assert_eq!(got, expected, "{what}: {part}");
        }
        assert_eq!(part.lines().count(), parts[0].lines().count(), "{what}");
    }
}

#[test]
fn an_ordinary_users_share_says_that_it_has_no_lists() {
    let (programs, user) = (programs(), OrdinaryUser::new());
    let (_folder, own) = user.own_folder();
    let share = (&*own, "ids=kept", "lists", seed());
    let got = in_guest(user.ringside(), programs.path(), &[share], &[]).remove(0);
    let lists: Vec<_> =
        got.lines().filter(|line| line.contains(" access ") || line.contains(" default ")).collect();
    let set: Vec<_> = lists.iter().filter(|line| line.contains("sum")).collect();
    assert!(set.len() > 20, "{got}");
    assert!(
        set.iter().all(|line| line.matches("= EOPNOTSUPP").count() == 3 || line.contains("= EINVAL")),
        "{set:?}"
    );
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

#[test]
fn an_ordinary_user_shares_no_more_than_is_theirs() {
    let user = OrdinaryUser::new();
    for kind in ["fs", "9p"] {
        let (_folder, own) = user.own_folder();
        std::fs::create_dir(own.join("sticky")).unwrap();
        for (name, mode) in
            [("own", 0o640), ("closed", 0), ("public", 0o644), ("secret", 0o600), ("sticky/f", 0o666)]
        {
            std::fs::write(own.join(name), name).unwrap();
            std::fs::set_permissions(own.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }
        std::fs::set_permissions(own.join("sticky"), std::fs::Permissions::from_mode(0o1777)).unwrap();
        user.give(&own.join("own"));
        user.give(&own.join("closed"));
        let before = std::fs::metadata(own.join("own")).unwrap();
        // What the guest's root may there, what it makes, and whom it gives that to.
        let mine = "cd /mnt/share; stat -c '%u:%g:%a' own; cat closed 2>&1; chown 5:6 own; chmod 6711 own; \
                    stat -c '%u:%g:%a' own; umask 077; mkdir private; echo x > private/f; mknod private/n c 1 3; \
                    chmod 0 private/f; cat private/f; chown 7 private/f; stat -c '%u:%a' private/f; ";
        let others = "stat -c '%u:%g:%a' public; cat public; echo; (echo x > public) 2>&1; cat secret 2>&1; \
                      chown 5 public 2>&1; chmod 4755 public 2>&1; rm -f sticky/f 2>&1; touch sticky/new && rm sticky/new";
        let script = if is_root() { format!("{mine}{others}") } else { mine.to_owned() };
        let mut command = user.ringside();
        command.args(["run", "--engine", "soft", "--share"]).arg(format!("{},as={kind}", own.display()));
        let output = run_within(command.args(["--exec", &script]), LIMIT);
        let got = text(&output);
        let said: Vec<&str> = got.lines().collect();
        assert_eq!(said[0], "0:0:640", "{kind}: {got}");
        assert!(said[1].ends_with("Permission denied"), "{kind}: {got}");
        assert_eq!(said[2..5], ["5:6:6711", "x", "7:0"], "{kind}: {got}");
        if is_root() {
            assert_eq!(said[5..7], ["65534:65534:644", "public"], "{kind}: {got}");
            let refused = &said[7..];
            assert_eq!(refused.len(), 5, "{kind}: {got}");
            let denied = |line: &&str| line.contains("denied") || line.contains("not permitted");
            assert!(refused.iter().all(denied), "{kind}: {got}");
            assert_eq!(std::fs::read(own.join("public")).unwrap(), b"public");
        }
        let after = std::fs::metadata(own.join("own")).unwrap();
        assert_eq!((after.uid(), after.gid(), after.mode() & 0o7777), (before.uid(), before.gid(), 0o711));
        let made = |name: &str| std::fs::symlink_metadata(own.join("private").join(name)).unwrap();
        assert!(made("n").is_file() && made("n").mode() & 0o7777 == 0o600);
        assert_eq!((made("f").uid(), made("f").mode() & 0o7777), (before.uid(), 0o600));
        assert_eq!(std::fs::metadata(own.join("private")).unwrap().mode() & 0o7777, 0o700);
    }
}
