//! The same images in QEMU's tools, where they are installed.

use std::process::{Command, Output};

use super::*;
use crate::qcow2::{check, repair};
use crate::{Conversion, convert, resize};

/// Runs one of QEMU's tools; `None` where it is not there.
fn tool(name: &str, arguments: &[&str]) -> Option<Output> {
    match Command::new(name).args(arguments).output() {
        Ok(output) => Some(output),
        Err(_) => {
            eprintln!("skipped: there is no {name} (Debian's package qemu-utils)");
            None
        }
    }
}

/// Runs one that has to succeed; what it says.
#[track_caller]
fn done(name: &str, arguments: &[&str]) -> Option<String> {
    let output = tool(name, arguments)?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{name} {arguments:?}: {text}");
    Some(text)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_is_written_here_is_read_there() {
    let folder = Folder::new();
    let path = folder.create("a.qcow2", 8 << 20);
    let disk = open(&Options::new(&path)).unwrap();
    disk.write(65536 * 3 + 512, &vec![0x11; 300 << 10]).unwrap();
    disk.write(7 << 20, &vec![0x22; 1 << 20]).unwrap();
    disk.write_zeroes(65536 * 4, 65536, true).unwrap();
    disk.discard(7 << 20, 65536).unwrap();
    drop(disk);
    let raw = folder.path("a.raw");
    let to = Creation::new(&raw, Format::Raw, 0);
    convert(&Conversion { from: Options::reading(&path), to }, &mut |_| {}).unwrap();
    let Some(said) = done("qemu-img", &["check", text(&path)]) else { return };
    assert!(said.contains("No errors"), "{said}");
    done("qemu-img", &["compare", text(&path), text(&raw)]);
    resize(&path, None, 100 << 20, false).unwrap();
    done("qemu-img", &["check", text(&path)]);
    done("qemu-io", &["-c", "read -P 0 8M 92M", "-c", "read -P 0x22 7405568 512", text(&path)]);
}

#[test]
fn what_is_written_there_is_read_here() {
    let folder = Folder::new();
    for options in
        ["compat=0.10", "compat=1.1", "cluster_size=4k", "refcount_bits=1", "preallocation=metadata"]
    {
        let path = folder.path("a.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-o", options, text(&path), "20M"];
        if done("qemu-img", &create).is_none() {
            return;
        }
        let script =
            ["-c", "write -P 5 100k 3M", "-c", "write -z 1M 64k", "-c", "discard 2M 128k", text(&path)];
        done("qemu-io", &script);
        let contents = whole(&path).unwrap();
        assert_eq!((contents[0], contents[100 << 10], contents[1 << 20], contents[3 << 20]), (0, 5, 0, 5));
        let found = check(&path).unwrap();
        assert!(found.is_clean(), "{options}: {found:?}");
        open(&Options::new(&path)).unwrap().write(10 << 20, &vec![8; 1 << 20]).unwrap();
        done("qemu-img", &["check", text(&path)]);
        done("qemu-io", &["-c", "read -P 8 10M 1M", "-c", "read -P 5 3M 64k", text(&path)]);
    }
}

#[test]
fn compressed_and_snapshotted_images_are_read_and_checked() {
    let folder = Folder::new();
    let (plain, packed) = (folder.path("a.qcow2"), folder.path("b.qcow2"));
    if done("qemu-img", &["create", "-q", "-f", "qcow2", text(&plain), "20M"]).is_none() {
        return;
    }
    done("qemu-io", &["-c", "write -P 5 0 5M", text(&plain)]);
    done("qemu-img", &["convert", "-c", "-O", "qcow2", text(&plain), text(&packed)]);
    assert!(whole(&packed).unwrap() == whole(&plain).unwrap());
    let found = check(&packed).unwrap();
    assert!(found.is_clean() && found.compressed > 0, "{found:?}");
    done("qemu-img", &["snapshot", "-c", "one", text(&plain)]);
    open(&Options::new(&plain)).unwrap().write(0, &vec![6; 1 << 20]).unwrap();
    assert!(check(&plain).unwrap().is_clean());
    done("qemu-img", &["check", text(&plain)]);
    done("qemu-img", &["snapshot", "-a", "one", text(&plain)]);
    assert_eq!(whole(&plain).unwrap()[0], 5);
    // Refcounts of shared clusters are rebuilt too.
    let mut image = std::fs::read(&plain).unwrap();
    image[56..60].fill(0);
    std::fs::write(&plain, image).unwrap();
    assert!(repair(&plain).unwrap().1.is_clean());
    done("qemu-img", &["check", text(&plain)]);
    done("qemu-img", &["snapshot", "-d", "one", text(&plain)]);
    done("qemu-img", &["check", text(&plain)]);
}

#[test]
fn a_machine_of_qemu_and_one_of_ours_exclude_each_other() {
    let folder = Folder::new();
    let path = folder.create("a.qcow2", 1 << 20);
    let disk = open(&Options::new(&path)).unwrap();
    for script in [&["-c", "write 0 512"][..], &["-r", "-c", "read 0 512"]] {
        let Some(output) = tool("qemu-io", &[script, &[text(&path)]].concat()) else { return };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("lock"), "{said}");
    }
    drop(disk);
    let _reader = open(&Options::reading(&path)).unwrap();
    done("qemu-io", &["-r", "-c", "read 0 512", text(&path)]);
    let output = tool("qemu-io", &["-c", "write 0 512", text(&path)]).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("lock"));
}
