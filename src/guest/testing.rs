//! Packages and modules made in memory, for the tests of this folder.

use std::io::Write;

use object::write::{Object, StandardSegment};

/// A `.deb` whose `data.tar` plus `ending` (`""`, `.gz`, `.xz`, `.zst`) holds `files`.
pub fn deb_of(ending: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, *data).unwrap();
    }
    deb_with_data(ending, &tar.into_inner().unwrap())
}

/// An entry of a package that is made for a test.
pub enum TarEntry<'a> {
    Folder(&'a str),
    File(&'a str, u32, &'a [u8]),
    Link(&'a str, &'a str),
    Same(&'a str, &'a str),
}

/// A `.deb` with entries of all kinds and a maintainer script; none where that is empty.
pub fn deb_of_entries(entries: &[TarEntry<'_>], postinst: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_mode(0o755);
        let mut link = |kind, path: &str, target: &str| {
            let mut header = header.clone();
            header.set_entry_type(kind);
            tar.append_link(&mut header, path, target).unwrap();
        };
        match entry {
            TarEntry::Link(path, target) => link(tar::EntryType::Symlink, path, target),
            TarEntry::Same(path, target) => link(tar::EntryType::Link, path, target),
            TarEntry::Folder(path) => {
                header.set_entry_type(tar::EntryType::Directory);
                tar.append_data(&mut header, path, &[][..]).unwrap();
            }
            TarEntry::File(path, mode, data) => {
                header.set_size(data.len() as u64);
                header.set_mode(*mode);
                tar.append_data(&mut header, path, *data).unwrap();
            }
        }
    }
    let mut control = tar::Builder::new(Vec::new());
    if !postinst.is_empty() {
        let mut header = tar::Header::new_gnu();
        header.set_size(postinst.len() as u64);
        control.append_data(&mut header, "./postinst", postinst.as_bytes()).unwrap();
    }
    deb_with(&control.into_inner().unwrap(), "", &tar.into_inner().unwrap())
}

/// A `.deb` with one file whose path is taken as it is.
pub fn deb_with_path(path: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(0);
    header.set_cksum();
    let mut data = header.as_bytes().to_vec();
    data.resize(data.len() + 1024, 0);
    deb_with_data("", &data)
}

fn deb_with_data(ending: &str, tar: &[u8]) -> Vec<u8> {
    deb_with(b"odd", ending, tar)
}

fn deb_with(control: &[u8], ending: &str, tar: &[u8]) -> Vec<u8> {
    let packed = match ending {
        "" => tar.to_vec(),
        ".gz" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        ".xz" => liblzma::encode_all(tar, 0).unwrap(),
        ".zst" => zstd::encode_all(tar, 1).unwrap(),
        other => panic!("no such compression: {other}"),
    };
    let mut archive = ar::Builder::new(Vec::new());
    let data = format!("data.tar{ending}");
    for (name, bytes) in
        [("debian-binary", &b"2.0\n"[..]), ("control.tar", control), (data.as_str(), packed.as_slice())]
    {
        archive.append(&ar::Header::new(name.as_bytes().to_vec(), bytes.len() as u64), bytes).unwrap();
    }
    archive.into_inner().unwrap()
}

/// A kernel module, as far as its `.modinfo` goes.
pub fn module_of(entries: &[&str]) -> Vec<u8> {
    use object::{Architecture, BinaryFormat, Endianness, SectionKind};
    let mut file = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let segment = file.segment_name(StandardSegment::Data).to_vec();
    let section = file.add_section(segment, b".modinfo".to_vec(), SectionKind::ReadOnlyData);
    let mut data = Vec::new();
    for entry in entries {
        data.extend_from_slice(entry.as_bytes());
        data.push(0);
    }
    file.append_section_data(section, &data, 1);
    file.write().unwrap()
}

/// The packages of a guest with three modules, of which one is needed by another that stands before it: a kernel that is
/// none, and a busybox that is none.
pub fn packages_in(folder: &std::path::Path) -> [super::apt::Package; 2] {
    let module = |entries: &[&str]| module_of(entries);
    let below = |path: &str| format!("./lib/modules/6.1.0-1-amd64/{path}");
    let (failover, net, ring) =
        (below("kernel/a/failover.ko"), below("kernel/net/virtio_net.ko"), below("kernel/v/v.ko.zst"));
    let ring_data = zstd::encode_all(module(&["depends="]).as_slice(), 1).unwrap();
    let kernel = deb_of(
        ".xz",
        &[
            ("./boot/vmlinuz-6.1.0-1-amd64", b"no real kernel"),
            (failover.as_str(), &module(&["depends="])),
            (net.as_str(), &module(&["alias=virtio:d00000001v*", "depends=failover,v"])),
            (ring.as_str(), &ring_data),
            (below("modules.builtin").as_str(), b"kernel/fs/ext4/ext4.ko\n"),
        ],
    );
    let busybox = deb_of(".gz", &[("./usr/bin/busybox", b"\x7fELF and so on")]);
    [("linux-image-1", kernel), ("busybox-static", busybox)].map(|(name, deb)| {
        let file = folder.join(format!("{name}_1_amd64.deb"));
        std::fs::write(&file, &deb).unwrap();
        let (name, version) = (name.to_owned(), "6.1.1-2".to_owned());
        super::apt::Package { name, version, size: deb.len() as u64, sha256: "ab".to_owned(), file }
    })
}
