//! The packages' files as one cpio archive.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use super::super::deb::{self, Entry, Kind};
use super::super::initramfs::Archive;
use super::super::{GuestError, Progress};
use super::alternatives::Alternatives;
use super::layout;

/// The most bytes that packages may unpack to: an initramfs must fit below 4 GiB, beside the machine's holes.
const MAX_BYTES: u64 = 2 << 30;

/// Writes the files of `debs` as an archive that the kernel unpacks over the guest's own.
///
/// # Errors
/// [`GuestError::Package`] for a package that is broken or where all are too much, and where the writer fails.
pub fn write(debs: &[PathBuf], out: &mut dyn Write, progress: &mut dyn Progress) -> Result<(), GuestError> {
    let mut tree = Tree {
        archive: Archive::new(out),
        folders: BTreeSet::new(),
        files: BTreeSet::new(),
        left: MAX_BYTES,
    };
    let failed = |error: io::Error| GuestError::package("packages", error);
    // Where programs look for libraries by the name that Debian gives them.
    tree.link("usr/lib", "../lib").map_err(failed)?;
    let mut alternatives = Alternatives::default();
    let mut read = 0;
    for deb in debs {
        deb::for_each_entry(deb, |entry| tree.add(entry))?;
        if let Some(script) = deb::read_script(deb, "postinst")? {
            alternatives.read(&script);
        }
        read += fs::metadata(deb).map_or(0, |meta| meta.len());
        progress.advance(read);
    }
    tree.add_alternatives(&alternatives).map_err(failed)?;
    tree.archive.finish().map_err(failed)
}

/// An archive that is being written, and what is in it.
struct Tree<'a> {
    archive: Archive<'a>,
    folders: BTreeSet<String>,
    /// Files and links.
    files: BTreeSet<String>,
    /// Bytes that may still come.
    left: u64,
}

impl Tree<'_> {
    fn add(&mut self, entry: &mut Entry<'_>) -> io::Result<()> {
        let Some(placed) = layout::place(entry.path) else { return Ok(()) };
        let mode = entry.mode;
        match &entry.kind {
            Kind::Folder => self.folder(&placed, mode),
            Kind::Link(target) => self.link(&placed, &layout::target(entry.path, target)),
            Kind::SameAs(target) => self.link(&placed, &format!("/{target}")),
            Kind::File => {
                self.left = self.left.checked_sub(entry.size).ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::FileTooLarge,
                        format!("all packages together unpack to more than {} GiB", MAX_BYTES >> 30),
                    )
                })?;
                let mut data = Vec::with_capacity(entry.size as usize);
                entry.reader.take(entry.size).read_to_end(&mut data)?;
                if data.len() as u64 != entry.size {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.parents(&placed)?;
                self.files.insert(placed.clone());
                self.archive.file(&placed, mode, &data)
            }
        }
    }

    fn folder(&mut self, placed: &str, mode: u32) -> io::Result<()> {
        self.parents(placed)?;
        if !self.files.contains(placed) && self.folders.insert(placed.to_owned()) {
            self.archive.folder_with(placed, mode)?;
        }
        Ok(())
    }

    /// The folders above, where no package brought them.
    fn parents(&mut self, placed: &str) -> io::Result<()> {
        for (at, _) in placed.match_indices('/') {
            let parent = &placed[..at];
            if !self.files.contains(parent) && self.folders.insert(parent.to_owned()) {
                self.archive.folder_with(parent, 0o755)?;
            }
        }
        Ok(())
    }

    fn link(&mut self, placed: &str, target: &str) -> io::Result<()> {
        // The kernel would not follow a link onto itself: /usr/bin/x -> /bin/x.
        let itself = target.strip_prefix('/').and_then(layout::place).is_some_and(|target| target == placed);
        let taken =
            layout::is_folder_of_guest(placed) && placed != "usr/lib" || self.folders.contains(placed);
        if itself || taken {
            return Ok(());
        }
        self.parents(placed)?;
        if self.files.insert(placed.to_owned()) {
            self.archive.link(placed, target)?;
        }
        Ok(())
    }

    /// Links to what is there; a package's own file is not replaced.
    fn add_alternatives(&mut self, alternatives: &Alternatives) -> io::Result<()> {
        let mut wanted = BTreeMap::new();
        for (link, target) in alternatives.links() {
            let place = |path: &str| layout::place(path.trim_start_matches('/'));
            if let Some((link, placed)) = place(link).zip(place(target))
                && self.files.contains(&placed)
            {
                wanted.insert(link, target.to_owned());
            }
        }
        wanted.iter().try_for_each(|(link, target)| self.link(link, target))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::initramfs::read_archive;
    use super::super::super::testing::{TarEntry, deb_of_entries};
    use super::*;
    use crate::guest::Silent;

    fn archive_of(packages: &[(&[TarEntry<'_>], &str)]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let folder = tempfile::tempdir().unwrap();
        let mut debs = Vec::new();
        for (at, (entries, postinst)) in packages.iter().enumerate() {
            let path = folder.path().join(format!("{at}.deb"));
            fs::write(&path, deb_of_entries(entries, postinst)).unwrap();
            debs.push(path);
        }
        let mut bytes = Vec::new();
        write(&debs, &mut bytes, &mut Silent).unwrap();
        read_archive(&bytes)
    }

    #[test]
    fn files_links_and_alternatives_of_several_packages_become_one_tree() {
        let files = archive_of(&[
            (
                &[
                    TarEntry::Folder("./usr/bin/"),
                    TarEntry::File("./usr/bin/mawk", 0o755, b"program"),
                    TarEntry::Link("./usr/bin/tool", "../share/tool/run"),
                    TarEntry::Same("./usr/bin/hard", "./usr/bin/mawk"),
                    TarEntry::File("./usr/share/doc/mawk/copyright", 0o644, b"long"),
                ],
                "update-alternatives --install /usr/bin/awk awk /usr/bin/mawk 5\n\
                 update-alternatives --install /usr/bin/gone gone /usr/bin/nowhere 5\n",
            ),
            (&[TarEntry::File("./lib/x86_64-linux-gnu/libm.so.6", 0o644, b"library")], ""),
        ]);
        assert_eq!(files["bin/mawk"], (0o10_0755, b"program".to_vec()));
        assert_eq!(files["bin/tool"], (0o12_0777, b"/usr/share/tool/run".to_vec()));
        assert_eq!(files["bin/hard"].1, b"/usr/bin/mawk");
        assert_eq!(files["bin/awk"].1, b"/usr/bin/mawk");
        assert_eq!(files["lib/x86_64-linux-gnu/libm.so.6"].1, b"library");
        assert_eq!(files["lib/x86_64-linux-gnu"].0 & 0o17_0000, 0o04_0000);
        assert_eq!(files["usr/lib"].1, b"../lib");
        assert!(!files.keys().any(|name| name.contains("doc") || name.contains("gone")));
    }

    #[test]
    fn a_link_where_the_guest_has_a_folder_and_one_onto_itself_are_left_out() {
        let files = archive_of(&[(
            &[
                TarEntry::Link("./bin", "usr/bin"),
                TarEntry::Link("./lib64", "usr/lib64"),
                TarEntry::Link("./bin/which", "/usr/bin/which"),
                TarEntry::Link("./dev/fd", "/proc/self/fd"),
            ],
            "",
        )]);
        assert_eq!(files.keys().collect::<Vec<_>>(), ["usr", "usr/lib"]);
    }

    #[test]
    fn a_package_that_is_cut_is_named_in_the_error() {
        let folder = tempfile::tempdir().unwrap();
        let deb = deb_of_entries(&[TarEntry::File("./a", 0o644, &[7; 3000])], "");
        let path = folder.path().join("some.deb");
        fs::write(&path, &deb[..deb.len() - 3000]).unwrap();
        let error = write(&[path], &mut Vec::new(), &mut Silent).unwrap_err().to_string();
        assert!(error.contains("some.deb") && error.contains("cut short"), "{error}");
    }
}
