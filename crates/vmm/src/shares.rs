//! Folders of the host for the guest: what is asked for, and the devices of it.

use std::path::PathBuf;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtio::fs::Cache;
use virtio::share::{Errno, Folder, Settings};

use crate::config::ConfigError;
use crate::error::BuildError;

/// A shared folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareConfig {
    /// The folder of the host.
    pub path: PathBuf,
    /// What the guest knows it as.
    pub tag: String,
    /// Whether the guest can only read.
    pub read_only: bool,
    /// What the device is.
    pub kind: ShareKind,
    /// What the guest may believe of what it has read.
    pub cache: ShareCache,
    /// Whether links, pipes and sockets can belong to anybody in the guest, see [`Settings::keep_all`].
    pub keep_all: bool,
}

/// What the device of a shared folder is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShareKind {
    /// virtio-fs.
    #[default]
    Fs,
    /// virtio-9p.
    P9,
}

/// What the guest may believe of what it has read of a virtio-fs folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShareCache {
    /// Nothing: it asks each time.
    None,
    /// What it read less than a second ago, and contents while a file is open.
    #[default]
    Auto,
    /// Everything: nobody else changes the folder.
    Always,
}

/// The most bytes of a tag: both devices have room for so many.
pub const MAX_TAG: usize = virtio::p9::MAX_TAG;
/// Descriptors that are left to the rest of the machine.
const SPARE: u64 = 256;
/// The most descriptors of one share.
const MOST: u64 = 1 << 16;

/// Refuses tags that no device can have, or two.
///
/// # Errors
/// The first of them.
pub(crate) fn check(shares: &[ShareConfig]) -> Result<(), ConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    for (index, ShareConfig { tag, .. }) in shares.iter().enumerate() {
        let starts = tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        if !starts || tag.len() > MAX_TAG || !tag.chars().all(plain) {
            return Err(ConfigError::ShareTag(tag.clone()));
        }
        if shares[..index].iter().any(|other| other.tag == *tag) {
            return Err(ConfigError::ShareTwice(tag.clone()));
        }
    }
    Ok(())
}

/// Makes the devices, for a guest with so many bytes of RAM.
///
/// # Errors
/// [`BuildError::Share`] for what is no folder or cannot be read.
pub(crate) fn devices(
    shares: &[ShareConfig],
    memory: u64,
) -> Result<Vec<Box<dyn virtio::Device>>, BuildError> {
    if shares.is_empty() {
        return Ok(Vec::new());
    }
    let descriptors = descriptors(shares.len() as u64);
    shares.iter().map(|share| device(share, memory, descriptors)).collect()
}

fn device(
    share: &ShareConfig,
    memory: u64,
    descriptors: usize,
) -> Result<Box<dyn virtio::Device>, BuildError> {
    let error = |reason: String| BuildError::Share { path: share.path.clone(), reason };
    let settings = Settings { read_only: share.read_only, memory, descriptors, keep_all: share.keep_all };
    let folder = Folder::open(&share.path, settings).map_err(|errno| {
        error(match errno {
            Errno::NOTDIR => "it is not a folder".to_owned(),
            Errno::NOENT if share.path.is_dir() => {
                "the host has no /proc, which it takes to share it".to_owned()
            }
            other => std::io::Error::from(other).to_string(),
        })
    })?;
    let cache = match share.cache {
        ShareCache::None => Cache::None,
        ShareCache::Auto => Cache::Auto,
        ShareCache::Always => Cache::Always,
    };
    Ok(match share.kind {
        ShareKind::Fs => Box::new(virtio::fs::device(folder, &share.tag, cache)),
        ShareKind::P9 => Box::new(virtio::p9::device(folder, &share.tag)),
    })
}

/// How many descriptors each of `shares` may have, after this process has allowed itself all that it can.
fn descriptors(shares: u64) -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // Where that is refused, there are as many as there were.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let each = (limit.saturating_sub(SPARE) / 2 / shares).min(MOST);
    usize::try_from(each).unwrap_or(usize::MAX).max(48)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(tag: &str) -> ShareConfig {
        ShareConfig {
            path: "/tmp".into(),
            tag: tag.into(),
            read_only: false,
            kind: ShareKind::Fs,
            cache: ShareCache::Auto,
            keep_all: false,
        }
    }

    #[test]
    fn tags_are_short_plain_words_and_each_is_another() {
        assert_eq!(check(&[share("a"), share("b-1.x"), share(&"t".repeat(31))]), Ok(()));
        for bad in ["", ".", "..", "-x", "a b", "a,b", "a/b", "ä", "a\n", &"t".repeat(32)] {
            assert_eq!(check(&[share(bad)]), Err(ConfigError::ShareTag(bad.into())));
        }
        assert_eq!(check(&[share("a"), share("b"), share("a")]), Err(ConfigError::ShareTwice("a".into())));
    }

    #[test]
    fn what_is_no_folder_is_refused_with_the_reason() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let refused = |path: PathBuf| {
            let result = devices(&[ShareConfig { path, ..share("a") }], 1 << 29);
            result.err().expect("refused").to_string()
        };
        assert!(refused(file.path().into()).contains("not a folder"));
        assert!(refused("/dev/null".into()).contains("not a folder"));
        let missing = refused("/nonexistent/x".into());
        assert!(missing.contains("/nonexistent/x") && missing.contains("No such file"), "{missing}");
    }

    #[test]
    fn folders_become_devices_of_both_kinds() {
        let kinds = [ShareKind::Fs, ShareKind::P9];
        let shares =
            kinds.map(|kind| ShareConfig { kind, ..share(if kind == ShareKind::Fs { "a" } else { "b" }) });
        let ids: Vec<_> = devices(&shares, 1 << 29).unwrap().iter().map(|device| device.id()).collect();
        assert_eq!(ids, [26, 9]);
    }
}
