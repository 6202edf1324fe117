//! Where a package's files go in a guest whose `/bin` holds all programs and whose `/lib` all libraries.
//!
//! The guest's folders are merged as Debian's are, the other way round: `usr/bin`, `usr/sbin` and `sbin` are links to
//! `bin`, `usr/lib` and `lib64` to `lib`.

use std::path::{Component, Path};

/// Folders that are links in the guest, and where they lead.
const MERGED: &[(&str, &str)] = &[
    ("usr/bin", "bin"),
    ("usr/sbin", "bin"),
    ("sbin", "bin"),
    ("usr/lib64", "lib"),
    ("usr/lib", "lib"),
    ("lib64", "lib"),
    ("var/run", "run"),
];

/// What nothing in a guest reads: manuals, translations, notes.
const LEFT_OUT: &[&str] = &[
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
];

/// What is the guest's own: folders that the kernel fills, and what init needs.
const RESERVED: &[&str] = &["dev", "proc", "sys", "ringside", "init", "bin/busybox"];

/// Where a package's entry goes; `None` where it is left out.
pub fn place(path: &str) -> Option<String> {
    if path.is_empty() || LEFT_OUT.iter().any(|folder| is_below(path, folder)) {
        return None;
    }
    let merged = MERGED.iter().find(|(from, _)| is_below(path, from));
    let placed = match merged {
        Some((from, to)) => format!("{to}{}", &path[from.len()..]),
        None => path.to_owned(),
    };
    (!RESERVED.iter().any(|name| is_below(&placed, name))).then_some(placed)
}

/// Whether a path is a folder or something in it.
fn is_below(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether a package may not put a link there, for the guest has a folder.
pub fn is_folder_of_guest(placed: &str) -> bool {
    let roots = ["bin", "lib", "usr", "etc", "run", "tmp", "root", "mnt", "var", "usr/share"];
    roots.contains(&placed) || MERGED.iter().any(|(from, _)| *from == placed)
}

/// The target of a package's link at `path`: one that climbs becomes absolute, for the link may stand elsewhere now.
pub fn target(path: &str, target: &str) -> String {
    let climbs = Path::new(target).components().any(|part| part == Component::ParentDir);
    if target.starts_with('/') || !climbs {
        return target.to_owned();
    }
    let mut parts: Vec<&str> = path.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_libraries_meet_in_one_folder_each() {
        for (from, to) in [
            ("usr/bin/python3", "bin/python3"),
            ("sbin/ldconfig", "bin/ldconfig"),
            ("usr/lib/x86_64-linux-gnu/libz.so.1", "lib/x86_64-linux-gnu/libz.so.1"),
            ("lib64/ld-linux-x86-64.so.2", "lib/ld-linux-x86-64.so.2"),
            ("usr/lib", "lib"),
            ("usr/libexec/a", "usr/libexec/a"),
            ("usr/share/perl/5.36", "usr/share/perl/5.36"),
            ("etc/ssl/openssl.cnf", "etc/ssl/openssl.cnf"),
        ] {
            assert_eq!(place(from).as_deref(), Some(to), "{from}");
        }
    }

    #[test]
    fn manuals_and_what_is_the_guests_own_are_left_out() {
        for path in [
            "",
            "usr/share/doc/gcc/x",
            "usr/share/man",
            "dev/null",
            "init",
            "bin/busybox",
            "usr/bin/busybox",
            "proc/x",
        ] {
            assert_eq!(place(path), None, "{path}");
        }
        assert!(place("usr/share/docbook/a").is_some() && place("usr/bin/initdb").is_some());
    }

    #[test]
    fn a_link_that_climbs_leads_where_it_led_before() {
        assert_eq!(target("usr/bin/foo", "../share/foo/run"), "/usr/share/foo/run");
        assert_eq!(target("usr/lib/gcc/12/x", "../../../bin/./x"), "/usr/bin/x");
        assert_eq!(target("usr/bin/python3", "python3.11"), "python3.11");
        assert_eq!(target("lib64/ld.so", "/lib/ld.so"), "/lib/ld.so");
        assert_eq!(target("a", "../../../../etc"), "/etc");
    }
}
