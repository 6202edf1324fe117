use std::os::unix::fs::FileExt;

use super::*;
use crate::qcow2::{check, repair};
use crate::{Cache, Conversion, convert, info, resize};

const SIZE: u64 = 3 << 20;

/// Reads or writes in place; whether that was possible.
fn in_place(disk: &dyn Disk, offset: u64, data: &mut [u8], write: bool) -> bool {
    let bytes = (offset, data.len() as u64);
    let moved = disk.in_place(bytes, write, &mut |file, at| match write {
        true => file.write_at(data, at),
        // What is behind the file's end is the disk's business.
        false => file.read_exact_at(data, at).map(|()| data.len()),
    });
    moved.is_some_and(|moved| moved.is_ok_and(|moved| moved as u64 == bytes.1))
}

/// Does random things to a disk and to a model of it.
fn exercise(disk: &dyn Disk, model: &mut [u8], random: &mut Random, steps: usize) {
    for _ in 0..steps {
        let offset = random.below(model.len() as u64 / 512) * 512;
        let most = (model.len() as u64 - offset).min(200 << 10) / 512;
        let len = (random.below(most) + 1) * 512;
        let range = offset as usize..(offset + len) as usize;
        match random.below(9) {
            0 | 1 => {
                let fill = random.below(256) as u8;
                model[range.clone()].fill(fill);
                disk.write(offset, &model[range]).unwrap();
            }
            2 => {
                let unmap = random.below(2) == 0;
                model[range].fill(0);
                disk.write_zeroes(offset, len, unmap).unwrap();
            }
            3 => {
                // What is left of discarded bytes is the disk's own business.
                disk.discard(offset, len).unwrap();
                disk.read(offset, &mut model[range]).unwrap();
            }
            4 => disk.flush().unwrap(),
            5 | 6 => {
                let fill = random.below(256) as u8;
                let mut data = vec![fill; len as usize];
                if in_place(disk, offset, &mut data, true) {
                    model[range].fill(fill);
                }
            }
            7 => {
                let mut data = vec![0; len as usize];
                assert!(!in_place(disk, offset, &mut data, false) || data == model[range], "at {offset:#x}");
            }
            _ => assert!(bytes(disk, offset, len as usize) == model[range], "at {offset:#x}"),
        }
    }
}

#[test]
fn every_format_keeps_what_is_written() {
    let folder = Folder::new();
    for name in ["a.raw", "a.qcow2"] {
        let path = folder.create(name, SIZE);
        let (mut model, mut random) = (vec![0; SIZE as usize], Random(7));
        for _ in 0..5 {
            let disk = open(&Options::new(&path)).unwrap();
            assert_eq!((disk.size(), disk.is_read_only()), (SIZE, false));
            exercise(&*disk, &mut model, &mut random, 100);
        }
        assert!(whole(&path).unwrap() == model, "{name}");
        if name.ends_with("qcow2") {
            let found = check(&path).unwrap();
            assert!(found.is_clean() && found.allocated > 0, "{found:?}");
        }
    }
}

#[test]
fn a_snapshot_forgets_what_is_written() {
    let folder = Folder::new();
    for name in ["a.raw", "a.qcow2"] {
        let path = folder.create(name, SIZE);
        open(&Options::new(&path)).unwrap().write(4096, &[7; 8192]).unwrap();
        let options = Options { snapshot: true, ..Options::new(&path) };
        let (one, two) = (open(&options).unwrap(), open(&options).unwrap());
        let mut model = whole(&path).unwrap();
        exercise(&*one, &mut model, &mut Random(3), 200);
        assert!(bytes(&*one, 0, SIZE as usize) == model);
        assert_eq!(bytes(&*two, 4096, 8192), [7; 8192], "snapshots know nothing of each other");
        drop((one, two));
        assert_eq!(whole(&path).unwrap()[4096..12288], [7; 8192]);
    }
}

#[test]
fn bytes_that_a_file_has_in_one_piece_are_reached_in_place() {
    let folder = Folder::new();
    let (base, top) = (folder.create("base.qcow2", SIZE), folder.path("top.qcow2"));
    open(&Options::new(&base)).unwrap().write(0, &[5; 128 << 10]).unwrap();
    let backing = Some(("base.qcow2".into(), None));
    create(&Creation { size: None, backing, ..Creation::new(&top, Format::Qcow2, 0) }).unwrap();
    let disk = open(&Options::new(&top)).unwrap();
    let reads = |disk: &dyn Disk, offset: u64| {
        let mut data = [0; 4096];
        in_place(disk, offset, &mut data, false).then_some(data[0])
    };
    let writes = |disk: &dyn Disk, offset: u64| in_place(disk, offset, &mut [6; 4096], true);
    assert_eq!((reads(&*disk, 0), writes(&*disk, 0)), (Some(5), false), "it is the backing file's");
    assert_eq!((reads(&*disk, 1 << 20), writes(&*disk, 1 << 20)), (None, false), "it is nowhere");
    disk.write(0, &[7; 4096]).unwrap();
    assert_eq!((reads(&*disk, 0), writes(&*disk, 4096)), (Some(7), true));
    assert_eq!(bytes(&*disk, 0, 12288), [[7; 4096], [6; 4096], [5; 4096]].concat());
    let mut more = vec![0; 128 << 10];
    assert!(!in_place(&*disk, 0, &mut more, false), "it is in two files");
    disk.discard(0, 64 << 10).unwrap();
    assert!(!writes(&*disk, 0), "it is given back");
    drop(disk);
    assert!(check(&top).unwrap().is_clean() && check(&base).unwrap().is_clean());
    let direct = Options { cache: Cache::Direct, ..Options::new(&base) };
    if let Ok(disk) = open(&direct) {
        assert!(!disk.is_cached() && reads(&*disk, 0).is_none());
    }
    let disk = open(&Options::reading(&base)).unwrap();
    assert_eq!((reads(&*disk, 0), writes(&*disk, 0)), (Some(5), false));
    drop(disk);
    let snapshot = Options { snapshot: true, ..Options::new(&base) };
    let disk = open(&snapshot).unwrap();
    assert_eq!((reads(&*disk, 0), writes(&*disk, 0)), (Some(5), false));
    disk.write(0, &[7; 4096]).unwrap();
    assert_eq!((reads(&*disk, 0), writes(&*disk, 0), reads(&*disk, 0)), (Some(7), true, Some(6)));
    assert_eq!(whole(&base).unwrap()[..4096], [5; 4096]);
}

#[test]
fn nothing_is_written_in_place_before_the_image_is_marked_or_behind_the_end_of_its_file() {
    let folder = Folder::new();
    let path = folder.create("a.qcow2", SIZE);
    let mut data = [6; 4096];
    open(&Options::new(&path)).unwrap().write(0, &[5; 64 << 10]).unwrap();
    // As other programs leave it: zeros at the end are not there.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 8192).unwrap();
    let disk = open(&Options::new(&path)).unwrap();
    assert!(!in_place(&*disk, 0, &mut data, true), "it was not changed yet");
    disk.write(0, &[5; 512]).unwrap();
    assert!(in_place(&*disk, 0, &mut data, true) && !in_place(&*disk, 60 << 10, &mut data, true));
    disk.write(60 << 10, &[5; 4096]).unwrap();
    assert!(in_place(&*disk, 60 << 10, &mut data, true));
    disk.close().unwrap();
    assert!(!in_place(&*disk, 0, &mut data, true), "it is closed");
    disk.write(512, &[5; 512]).unwrap();
    assert!(in_place(&*disk, 0, &mut data, true));
}

#[test]
fn an_overlay_shows_its_backing_file_where_it_was_not_written() {
    let folder = Folder::new();
    let base = folder.create("base.raw", SIZE);
    open(&Options::new(&base)).unwrap().write(0, &vec![5; SIZE as usize]).unwrap();
    for (name, backing) in [("middle.qcow2", "base.raw"), ("top.qcow2", "middle.qcow2")] {
        let size = create(&Creation {
            size: None,
            backing: Some((backing.into(), None)),
            ..Creation::new(folder.path(name), Format::Qcow2, 0)
        });
        assert_eq!(size.unwrap(), SIZE);
    }
    let top = folder.path("top.qcow2");
    let mut model = vec![5; SIZE as usize];
    exercise(&*open(&Options::new(&top)).unwrap(), &mut model, &mut Random(11), 300);
    assert!(whole(&top).unwrap() == model);
    assert_eq!(whole(&base).unwrap(), vec![5; SIZE as usize]);
    let layers = info(&top, None).unwrap().layers;
    let formats: Vec<_> = layers.iter().map(|layer| layer.format).collect();
    assert_eq!(formats, [Format::Qcow2, Format::Qcow2, Format::Raw]);
    // Larger than its backing file, and then the backing file grows: that must not show.
    assert_eq!(resize(&top, None, SIZE * 2, false).unwrap(), SIZE);
    model.resize(SIZE as usize * 2, 0);
    assert!(whole(&top).unwrap() == model);
    assert!(check(&top).unwrap().is_clean());
}

#[test]
fn what_is_cut_off_is_gone_when_the_disk_grows_again() {
    let folder = Folder::new();
    for name in ["a.raw", "a.qcow2"] {
        let path = folder.create(name, SIZE);
        open(&Options::new(&path)).unwrap().write(0, &vec![9; SIZE as usize]).unwrap();
        assert!(resize(&path, None, 1 << 20, false).unwrap_err().to_string().contains("--shrink"));
        resize(&path, None, 1 << 20, true).unwrap();
        resize(&path, None, SIZE, false).unwrap();
        let contents = whole(&path).unwrap();
        assert!(contents[..1 << 20].iter().all(|&byte| byte == 9), "{name}");
        assert!(contents[1 << 20..].iter().all(|&byte| byte == 0), "{name}");
        assert!(resize(&path, None, 1000, true).unwrap_err().to_string().contains("multiple of 512"));
    }
}

#[test]
fn conversions_keep_the_bytes_and_leave_the_zeros_out() {
    let folder = Folder::new();
    let from = folder.create("from.raw", 64 << 20);
    let disk = open(&Options::new(&from)).unwrap();
    disk.write(5 << 20, &[1; 5000 / 512 * 512]).unwrap();
    disk.write(40 << 20, &vec![2; 1 << 20]).unwrap();
    disk.write((64 << 20) - 512, &[3; 512]).unwrap();
    drop(disk);
    let mut last = from.clone();
    for (name, format) in [("b.qcow2", Format::Qcow2), ("c.raw", Format::Raw), ("d.qcow2", Format::Qcow2)] {
        let to = Creation::new(folder.path(name), format, 0);
        let mut told = 0;
        let conversion = Conversion { from: Options::reading(&last), to };
        let (size, written) = convert(&conversion, &mut |bytes| told = bytes).unwrap();
        assert_eq!((size, told), (64 << 20, 64 << 20));
        assert!((1 << 20..2 << 20).contains(&written), "{written}");
        last = folder.path(name);
        assert!(whole(&last).unwrap() == whole(&from).unwrap(), "{name}");
        let layer = &info(&last, None).unwrap().layers[0];
        assert!(layer.allocated < 4 << 20, "{name} takes up {}", layer.allocated);
    }
    let again = Conversion { from: Options::reading(&from), to: Creation::new(&last, Format::Raw, 0) };
    assert!(convert(&again, &mut |_| {}).unwrap_err().to_string().contains("--force"));
}

#[test]
fn past_the_page_cache_the_bytes_are_the_same() {
    let folder = Folder::new();
    for name in ["a.raw", "a.qcow2"] {
        let path = folder.create(name, SIZE);
        let options = Options { cache: Cache::Direct, ..Options::new(&path) };
        let disk = match open(&options) {
            Ok(disk) => disk,
            Err(error) => {
                eprintln!("skipped: {error}");
                return;
            }
        };
        let mut model = vec![0; SIZE as usize];
        exercise(&*disk, &mut model, &mut Random(5), 100);
        drop(disk);
        assert!(whole(&path).unwrap() == model, "{name}");
    }
}

#[test]
fn planted_leaks_and_errors_are_found_and_repaired() {
    let folder = Folder::new();
    let path = folder.create("a.qcow2", SIZE);
    open(&Options::new(&path)).unwrap().write(0, &vec![6; 1 << 20]).unwrap();
    let before = whole(&path).unwrap();
    let image = std::fs::read(&path).unwrap();
    // The one block of refcounts, of 16 bits each, is the third cluster.
    let refcounts = 2 << 16;
    assert_eq!(image[refcounts..refcounts + 6], [0, 1, 0, 1, 0, 1]);
    let plant = |changes: &[(usize, u8)]| {
        let mut image = image.clone();
        image.resize(image.len() + (2 << 16), 0);
        for &(at, byte) in changes {
            image[at] = byte;
        }
        std::fs::write(&path, image).unwrap();
        check(&path).unwrap()
    };
    let last = image.len() >> 16;
    let leak = plant(&[(refcounts + 2 * last + 1, 1)]);
    assert_eq!((leak.errors, leak.leaks, leak.is_clean()), (0, 1, false));
    let zero = plant(&[(refcounts + 11, 0)]);
    assert_eq!((zero.errors, zero.leaks), (1, 0), "{zero:?}");
    let both = plant(&[(refcounts + 2 * last + 1, 1), (refcounts + 11, 0), (refcounts + 13, 2)]);
    assert!(both.errors >= 2 && both.leaks == 2, "{both:?}");
    let (found, after) = repair(&path).unwrap();
    assert!(found == both && after.is_clean(), "{after:?}");
    assert!(whole(&path).unwrap() == before);
    // It can be written as before.
    exercise(&*open(&Options::new(&path)).unwrap(), &mut before.clone(), &mut Random(9), 100);
    assert!(check(&path).unwrap().is_clean());
}

#[test]
fn refcounts_of_every_width_are_read_and_rebuilt() {
    let folder = Folder::new();
    for (order, cluster_bits) in (0..=6).flat_map(|order| [(order, 9), (order, 16)]) {
        let path = folder.path("a.qcow2");
        let file = imago::file::File::try_from(
            std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap(),
        );
        use imago::FormatCreateBuilder;
        imago::qcow2::Qcow2::<imago::file::File>::create_builder(file.unwrap())
            .size(SIZE)
            .refcount_width(1 << order)
            .cluster_size(1 << cluster_bits)
            .create()
            .unwrap();
        let mut model = vec![0; SIZE as usize];
        exercise(&*open(&Options::new(&path)).unwrap(), &mut model, &mut Random(13), 60);
        let found = check(&path).unwrap();
        assert!(found.is_clean(), "{order} {cluster_bits}: {found:?}");
        // Without any refcounts, all of them are made anew.
        let mut image = std::fs::read(&path).unwrap();
        image[56..60].fill(0);
        std::fs::write(&path, image).unwrap();
        assert!(check(&path).unwrap().errors > 3);
        let (_, after) = repair(&path).unwrap();
        assert!(after.is_clean(), "{order} {cluster_bits}: {after:?}");
        assert!(whole(&path).unwrap() == model);
    }
}

/// What kill -9 leaves is the file as it is between two calls: there it holds all that was flushed, without errors.
#[test]
fn what_was_flushed_is_in_the_file_at_any_time() {
    let folder = Folder::new();
    for cluster_size in [512, 4096, 64 << 10] {
        let path = folder.path("a.qcow2");
        let creation = Creation {
            cluster_size: Some(cluster_size),
            replace: true,
            ..Creation::new(&path, Format::Qcow2, SIZE)
        };
        create(&creation).unwrap();
        let disk = open(&Options::new(&path)).unwrap();
        let (mut model, mut random) = (vec![0; SIZE as usize], Random(17));
        // Sectors that were written since the last flush may be either.
        let mut unsure = vec![false; SIZE as usize / 512];
        let copy = folder.path("copy.qcow2");
        for step in 0..300 {
            let offset = random.below(SIZE / 512 - 300) * 512;
            let len = (random.below(300) + 1) * 512;
            let range = offset as usize..(offset + len) as usize;
            match random.below(4) {
                0 | 1 => {
                    model[range.clone()].fill(step as u8 | 1);
                    disk.write(offset, &model[range.clone()]).unwrap();
                    unsure[range.start / 512..range.end / 512].fill(true);
                }
                2 => {
                    model[range.clone()].fill(0);
                    disk.write_zeroes(offset, len, true).unwrap();
                    unsure[range.start / 512..range.end / 512].fill(true);
                }
                _ => {
                    disk.flush().unwrap();
                    unsure.fill(false);
                }
            }
            if step % 5 == 0 {
                std::fs::copy(&path, &copy).unwrap();
                let found = check(&copy).unwrap();
                assert!(found.errors == 0 || found.dirty, "step {step}: {:?}", found.told);
                let kept = whole(&copy).unwrap();
                for (sector, _) in unsure.iter().enumerate().filter(|&(_, unsure)| !unsure) {
                    let range = sector * 512..sector * 512 + 512;
                    assert!(kept[range.clone()] == model[range], "step {step}: sector {sector} is lost");
                }
                let found = check(&copy).unwrap();
                assert!(found.is_clean(), "opening it repaired it: {found:?}");
            }
        }
        drop(disk);
        assert!(check(&path).unwrap().is_clean());
    }
}

#[test]
fn an_image_that_is_closed_is_clean_until_the_next_change() {
    let folder = Folder::new();
    let path = folder.create("a.qcow2", SIZE);
    let present = || {
        let copy = folder.path("copy.qcow2");
        std::fs::copy(&path, &copy).unwrap();
        check(&copy).unwrap()
    };
    let disk = open(&Options::new(&path)).unwrap();
    for fill in 1..3 {
        disk.write(4096, &[fill; 512]).unwrap();
        assert!(present().dirty);
        disk.close().unwrap();
        assert!(present().is_clean());
    }
    assert_eq!(bytes(&*disk, 4096, 512), [2; 512]);
}
