use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::info;
use crate::qcow2::{check, repair};

#[test]
fn a_disk_has_one_writer_or_several_readers() {
    let folder = Folder::new();
    for name in ["a.raw", "a.qcow2"] {
        let path = folder.create(name, 1 << 20);
        let writer = open(&Options::new(&path)).unwrap();
        for options in [Options::new(&path), Options::reading(&path)] {
            assert!(refusal(&options).contains("another process"));
        }
        assert!(refusal(&Options { snapshot: true, ..Options::new(&path) }).contains("another process"));
        info(&path, None).unwrap();
        drop(writer);
        let readers = (open(&Options::reading(&path)).unwrap(), open(&Options::reading(&path)).unwrap());
        assert!(refusal(&Options::new(&path)).contains("another process uses it"));
        drop(readers);
        open(&Options::new(&path)).unwrap();
    }
}

#[test]
fn a_backing_file_is_not_written_while_it_is_used() {
    let folder = Folder::new();
    let base = folder.create("base.qcow2", 1 << 20);
    let top = Creation {
        backing: Some(("base.qcow2".into(), Some(Format::Qcow2))),
        ..Creation::new(folder.path("top.qcow2"), Format::Qcow2, 1 << 20)
    };
    create(&top).unwrap();
    let disk = open(&Options::new(&top.path)).unwrap();
    assert!(refusal(&Options::new(&base)).contains("another process"));
    drop(disk);
    let _base = open(&Options::new(&base)).unwrap();
    let refused = refusal(&Options::new(&top.path));
    assert!(refused.contains("base.qcow2") && refused.contains("another process"), "{refused}");
}

#[test]
fn what_is_no_file_of_sectors_is_refused_with_the_reason() {
    let folder = Folder::new();
    let path = folder.path("a\nb.img");
    for (len, why) in [(0, "is empty"), (513, "no multiple of 512")] {
        std::fs::write(&path, vec![0; len]).unwrap();
        let refused = refusal(&Options::reading(&path));
        assert!(refused.contains(why) && refused.contains("a\\nb.img"), "{refused}");
    }
    assert!(refusal(&Options::new("/")).contains("a directory"));
    assert!(refusal(&Options::new("/dev/zero")).contains("a special file"));
    assert!(refusal(&Options::new("/nonexistent")).contains("No such file"));
    let fifo = folder.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    assert!(refusal(&Options::reading(&fifo)).contains("a special file"));
    let strange = folder.path("x").with_file_name(std::ffi::OsStr::from_bytes(b"\xff.img"));
    assert!(refusal(&Options::new(strange)).contains("No such file"));
}

/// An image with these bytes changed.
fn changed(folder: &Folder, changes: &[(usize, &[u8])]) -> PathBuf {
    let path = folder.path("bad.qcow2");
    let _ = std::fs::remove_file(&path);
    folder.create("bad.qcow2", 1 << 20);
    open(&Options::new(&path)).unwrap().write(0, &vec![1; 256 << 10]).unwrap();
    let mut image = std::fs::read(&path).unwrap();
    for &(at, bytes) in changes {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    std::fs::write(&path, image).unwrap();
    path
}

#[test]
fn headers_that_cannot_be_are_refused_by_what_is_wrong() {
    let folder = Folder::new();
    for (at, bytes, why) in [
        (0, &b"QFI\xfa"[..], "no qcow2 image"),
        (4, &[0, 0, 0, 1], "version 1"),
        (4, &[0, 0, 0, 9], "version 9"),
        (20, &[0, 0, 0, 8], "cluster bits"),
        (20, &[0, 0, 0, 63], "cluster bits"),
        (24, &[0xff; 8], "the disk's size"),
        (24, &[0x7f, 0, 0, 0, 0, 0, 0, 0], "too small for the disk"),
        (32, &[0, 0, 0, 1], "encrypted"),
        (32, &[0, 0, 0, 2], "encrypted"),
        (36, &[0xff; 4], "level 1 table"),
        (40, &[0xff; 8], "level 1 table"),
        (40, &[0, 0, 0, 0, 0x7f, 0, 0, 0], "truncated"),
        (56, &[0xff; 4], "refcount table"),
        (60, &[0xff; 4], "snapshots"),
        (79, &[2], "marked as damaged"),
        (79, &[4], "an external data file"),
        (79, &[8], "compression"),
        (79, &[16], "extended level 2"),
        (78, &[4], "incompatible features 0x400"),
        (96, &[0, 0, 0, 7], "refcounts' width"),
        (100, &[0xff; 4], "its length"),
        (100, &[0, 0, 0, 8], "its length"),
    ] {
        let path = changed(&folder, &[(at, bytes)]);
        let options = Options { format: Some(Format::Qcow2), ..Options::new(path) };
        let refused = refusal(&options);
        assert!(refused.contains(why), "{at}: {refused}");
    }
}

#[test]
fn truncated_images_are_refused() {
    let folder = Folder::new();
    let path = changed(&folder, &[]);
    let image = std::fs::read(&path).unwrap();
    for len in [5, 72, 200, 65536, 3 * 65536, 4 * 65536, image.len() - 65536] {
        std::fs::write(&path, &image[..len]).unwrap();
        let refused = refusal(&Options::new(&path));
        assert!(refused.contains("truncated"), "{len}: {refused}");
    }
}

#[test]
fn backing_files_that_cannot_be_are_refused() {
    let folder = Folder::new();
    folder.create("base.qcow2", 1 << 20);
    let chain = |name: &str, backing: &str| {
        let creation = Creation {
            backing: Some((backing.into(), Some(Format::Qcow2))),
            ..Creation::new(folder.path(name), Format::Qcow2, 1 << 20)
        };
        create(&creation).map(|_| folder.path(name))
    };
    let one = chain("one.qcow2", "base.qcow2").unwrap();
    chain("two.qcow2", "one.qcow2").unwrap();
    // The first one now has the second one below it.
    std::fs::rename(folder.path("two.qcow2"), folder.path("base.qcow2")).unwrap();
    assert!(refusal(&Options::new(&one)).contains("circle"));
    std::fs::remove_file(folder.path("base.qcow2")).unwrap();
    let refused = refusal(&Options::new(&one));
    assert!(refused.contains("base.qcow2") && refused.contains("No such file"), "{refused}");
    assert!(info(&one, None).unwrap().broken.is_some());
    std::fs::create_dir(folder.path("base.qcow2")).unwrap();
    assert!(refusal(&Options::new(&one)).contains("a directory"));
    assert!(chain("x.qcow2", "nothing.qcow2").unwrap_err().to_string().contains("nothing.qcow2"));
    // Names of protocols: as long as the file's name was, so that they take its place.
    let place = std::fs::read(&one).unwrap();
    let at = place.windows(10).position(|window| window == b"base.qcow2").unwrap();
    for name in [b"nbd://a:10", b"json:{\"\"} ", b"host_dev:x"] {
        let mut image = place.clone();
        image[at..at + 10].copy_from_slice(name);
        std::fs::write(&one, image).unwrap();
        assert!(refusal(&Options::new(&one)).contains("only files"), "{name:?}");
    }
    let deep = folder.create("c0.qcow2", 1 << 20);
    for index in 1..=65 {
        let (below, name) = (format!("c{}.qcow2", index - 1), format!("c{index}.qcow2"));
        let made = chain(&name, &below);
        assert_eq!(made.is_ok(), index <= 65, "{made:?}");
    }
    assert!(refusal(&Options::new(folder.path("c65.qcow2"))).contains("more than 64 backing files"));
    open(&Options::new(deep)).unwrap();
}

#[test]
fn a_guest_cannot_make_a_raw_image_look_like_another() {
    let folder = Folder::new();
    let path = folder.create("a.raw", 1 << 20);
    let disk = open(&Options::new(&path)).unwrap();
    assert!(disk.direct().unwrap().guarded > 0);
    assert!(disk.write(0, b"QFI\xfb and more").is_err());
    disk.write(512, b"QFI\xfb and more").unwrap();
    drop(disk);
    let told = open(&Options { format: Some(Format::Raw), ..Options::new(&path) }).unwrap();
    assert_eq!(told.direct().unwrap().guarded, 0);
    told.write(0, b"QFI\xfb").unwrap();
}

#[test]
fn images_that_cannot_be_created_leave_no_file() {
    let folder = Folder::new();
    let path = folder.path("a.qcow2");
    let plain = Creation::new(&path, Format::Qcow2, 1 << 20);
    for (creation, why) in [
        (Creation { size: Some(0), ..plain.clone() }, "no bytes"),
        (Creation { size: Some(513), ..plain.clone() }, "multiple of 512"),
        (Creation { size: Some(!511), ..plain.clone() }, "larger than"),
        (Creation { size: Some(1 << 60), ..plain.clone() }, ""),
        (Creation { cluster_size: Some(1000), ..plain.clone() }, "power of two"),
        (Creation { size: None, ..plain.clone() }, "needs a size"),
        (Creation { path: folder.path("no/a.qcow2"), ..plain.clone() }, "No such file"),
        (Creation { format: Format::Raw, backing: Some(("b".into(), None)), ..plain.clone() }, "no backing"),
        (Creation { format: Format::Raw, cluster_size: Some(512), ..plain.clone() }, "no clusters"),
    ] {
        let refused = create(&creation).expect_err(why).to_string();
        assert!(refused.contains(why), "{refused}");
        assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 0, "{why}");
    }
    create(&plain).unwrap();
    assert!(create(&plain).unwrap_err().to_string().contains("--force"));
    let disk = open(&Options::new(&path)).unwrap();
    let replace = Creation { replace: true, ..plain.clone() };
    assert!(create(&replace).unwrap_err().to_string().contains("another process"));
    drop(disk);
    create(&replace).unwrap();
}

/// Images with random damage in their tables: nothing panics, and no work is without bound.
#[test]
fn damaged_images_end_in_errors() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let folder = Folder::new();
    let path = changed(&folder, &[]);
    let image = std::fs::read(&path).unwrap();
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        PANICS.fetch_add(1, Ordering::Relaxed);
    }));
    let mut random = Random(1);
    let rounds = std::env::var("RINGSIDE_FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    for round in 0..rounds {
        let mut bad = image.clone();
        for _ in 0..=random.below(4) {
            // Mostly where the header and the entries are: at the beginning of clusters.
            let cluster = random.below(bad.len() as u64 / 65536) * 65536;
            let reach = [8, 112, 512][random.below(3) as usize];
            let at = (cluster + random.below(reach)) as usize;
            bad[at] = match random.below(3) {
                0 => bad[at] ^ 1 << random.below(8),
                1 => random.below(256) as u8,
                _ => [0, 0x40, 0x80, 0xff][random.below(4) as usize],
            };
        }
        std::fs::write(&path, &bad).unwrap();
        let options = Options { format: Some(Format::Qcow2), ..Options::new(&path) };
        if let Ok(disk) = open(&options) {
            let size = disk.size().min(2 << 20);
            let mut buffer = vec![0; 64 << 10];
            for offset in (0..size & !0xffff).step_by(64 << 10) {
                let _ = disk.read(offset, &mut buffer);
                let _ = disk.write(offset, &buffer[..4096]);
                let _ = disk.extent(offset);
                let _ =
                    disk.in_place((offset, 4096), true, &mut |file, at| file.write_at(&buffer[..4096], at));
                let _ = disk.in_place((offset, 4096), false, &mut |file, at| file.read_at(&mut buffer, at));
            }
            let _ = disk.write_zeroes(0, size.min(100 << 10), true);
            let _ = disk.discard(size / 2, size / 4);
            let _ = disk.flush();
        }
        let _ = info(&path, None);
        if check(&path).is_ok() {
            let _ = repair(&path);
        }
        let length = path.metadata().unwrap().len();
        assert!(length < 1 << 40, "round {round}: a file of {length} bytes");
    }
    panic::set_hook(hook);
    assert_eq!(PANICS.load(Ordering::Relaxed), 0);
}
