//! `--share` and `--root`: the words of a shared folder.

use vmm::config::{MAX_SHARE_TAG, ShareCache, ShareConfig, ShareKind};

const USAGE: &str = "DIR[,tag=TAG][,readonly=on|off][,as=fs|9p][,cache=auto|always|none][,ids=mapped|kept]";

/// The tag of the folder that `--root` gives.
pub const ROOT_TAG: &str = "root";

/// Reads one value of `--share`; the tag is empty where none is given.
///
/// # Errors
/// A message for the user.
pub fn share(text: &str) -> Result<ShareConfig, String> {
    options(text, false)
}

fn options(text: &str, keep_all: bool) -> Result<ShareConfig, String> {
    let mut share = ShareConfig {
        path: text.into(),
        tag: String::new(),
        read_only: false,
        kind: ShareKind::Fs,
        cache: ShareCache::Auto,
        keep_all,
    };
    let mut rest = text;
    // From the end: a folder's name may have commas.
    while let Some((before, option)) = rest.rsplit_once(',') {
        match option.split_once('=') {
            Some(("tag", tag)) => share.tag = checked_tag(tag)?,
            Some(("readonly", "on")) => share.read_only = true,
            Some(("readonly", "off")) => share.read_only = false,
            Some(("readonly", _)) => return Err("readonly is on or off".into()),
            Some(("as", "fs")) => share.kind = ShareKind::Fs,
            Some(("as", "9p")) => share.kind = ShareKind::P9,
            Some(("as", other)) => {
                return Err(format!("{other:?} is no way to share a folder: fs and 9p are"));
            }
            Some(("ids", "mapped")) => share.keep_all = false,
            Some(("ids", "kept")) => share.keep_all = true,
            Some(("ids", other)) => {
                return Err(format!("{other:?} is no way to have owners: mapped and kept are"));
            }
            Some(("cache", cache)) => share.cache = cache_mode(cache)?,
            Some((other, _)) if other.chars().all(|c| c.is_ascii_lowercase()) => {
                return Err(format!("{other:?} is no option of a share: write {USAGE}"));
            }
            _ => break,
        }
        rest = before;
    }
    if rest.is_empty() || rest.contains('\0') {
        return Err(format!("a share needs a folder: write {USAGE}"));
    }
    share.path = rest.into();
    Ok(share)
}

/// How the default guests mount a share: its type and its options.
pub fn mount(share: &ShareConfig) -> String {
    let access = if share.read_only { "ro" } else { "rw" };
    match (share.kind, share.cache) {
        (ShareKind::Fs, _) => format!("virtiofs {access}"),
        (ShareKind::P9, ShareCache::None) => format!("9p {access},cache=none"),
        // Files that are mapped are kept while they are.
        (ShareKind::P9, ShareCache::Auto) => format!("9p {access},cache=mmap"),
        (ShareKind::P9, ShareCache::Always) => format!("9p {access},cache=loose"),
    }
}

fn cache_mode(text: &str) -> Result<ShareCache, String> {
    match text {
        "none" => Ok(ShareCache::None),
        "auto" => Ok(ShareCache::Auto),
        "always" => Ok(ShareCache::Always),
        other => Err(format!("{other:?} is no way to cache: auto, always and none are")),
    }
}

fn checked_tag(tag: &str) -> Result<String, String> {
    match tag.len() {
        0 => Err("the tag is empty".into()),
        len if len > MAX_SHARE_TAG => Err(format!("the tag has {len} bytes: the most is {MAX_SHARE_TAG}")),
        _ => Ok(tag.to_owned()),
    }
}

/// Reads the value of `--root`.
///
/// # Errors
/// A message for the user.
pub fn root(text: &str) -> Result<ShareConfig, String> {
    let share = options(text, true)?;
    match share.tag.as_str() {
        "" => Ok(ShareConfig { tag: ROOT_TAG.to_owned(), ..share }),
        _ => Err("the root folder has no tag to choose".into()),
    }
}

/// The shares with tags for those that were given none: `share`, `share2` …, as far as they are free.
pub fn with_tags(root: Option<&ShareConfig>, shares: &[ShareConfig]) -> Vec<ShareConfig> {
    let mut all: Vec<ShareConfig> = root.into_iter().chain(shares).cloned().collect();
    let mut taken: Vec<String> = all.iter().map(|share| share.tag.clone()).collect();
    for share in all.iter_mut().filter(|share| share.tag.is_empty()) {
        let names = std::iter::once("share".to_owned()).chain((2..).map(|number| format!("share{number}")));
        share.tag = names.into_iter().find(|name| !taken.contains(name)).unwrap_or_default();
        taken.push(share.tag.clone());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_folder_with_options() {
        let plain = share("/srv/x").unwrap();
        assert_eq!(
            (plain.path.to_str(), plain.read_only, plain.kind),
            (Some("/srv/x"), false, ShareKind::Fs)
        );
        let full = share("a,b=c d,tag=t,readonly=on,as=9p").unwrap_err();
        assert!(full.contains("\"b\" is no option"), "{full}");
        let full = share("a, b,tag=t,readonly=on,as=9p").unwrap();
        assert_eq!((full.path.to_str(), full.tag.as_str()), (Some("a, b"), "t"));
        assert_eq!((full.read_only, full.kind), (true, ShareKind::P9));
        assert_eq!(share("a,cache=always").unwrap().cache, ShareCache::Always);
    }

    #[test]
    fn the_guest_mounts_a_share_as_it_is_asked_for() {
        let mounted = |text| mount(&share(text).unwrap());
        assert_eq!(mounted("a,cache=none"), "virtiofs rw");
        assert_eq!(mounted("a,readonly=on,as=9p"), "9p ro,cache=mmap");
        assert_eq!(mounted("a,as=9p,cache=always"), "9p rw,cache=loose");
        assert_eq!(mounted("a,as=9p,cache=none"), "9p rw,cache=none");
    }

    #[test]
    fn bad_options_are_named() {
        let long = format!("a,tag={}", "t".repeat(32));
        for (text, why) in [
            ("", "needs a folder"),
            (",readonly=on", "needs a folder"),
            ("a,readonly=yes", "on or off"),
            ("a,as=nfs", "fs and 9p"),
            ("a,ro=on", "no option"),
            ("a,tag=", "empty"),
            ("a,cache=some", "no way to cache"),
            ("a,ids=none", "mapped and kept"),
            (&long, "32 bytes: the most is 31"),
        ] {
            let error = share(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(root("a,tag=t").is_err());
    }

    #[test]
    fn in_a_root_folder_everything_can_belong_to_anybody() {
        assert!(!share("a").unwrap().keep_all && share("a,ids=kept").unwrap().keep_all);
        assert!(root("a").unwrap().keep_all && !root("a,ids=mapped").unwrap().keep_all);
    }

    #[test]
    fn shares_without_a_tag_get_one_that_is_free() {
        let shares = ["a", "b,tag=share2", "c"].map(|text| share(text).unwrap());
        let root = root("r").unwrap();
        let tags: Vec<_> = with_tags(Some(&root), &shares).into_iter().map(|share| share.tag).collect();
        assert_eq!(tags, ["root", "share", "share2", "share3"]);
    }
}
