//! Which of the system's package sources are Debian's: a fetch uses those, so that mirrors and their keys are honoured,
//! and a third party's source that fails harms nothing. Formats: sources.list(5), one-line and deb822 style.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Debian's own key.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The release that is fetched where the system names none.
const RELEASE: &str = "bookworm";
/// More than anyone's list of sources has, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The options of a source that are kept: how it is checked, and nothing else.
const KEPT_OPTIONS: &[&str] =
    &["Signed-By", "Trusted", "Check-Valid-Until", "Valid-Until-Max", "Check-Date", "By-Hash"];

/// Where packages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Base addresses.
    uris: Vec<String>,
    /// Releases: `bookworm`, `bookworm-security` …
    suites: Vec<String>,
    /// Fields in deb822's spelling.
    options: Vec<(String, String)>,
}

/// How sure it is that a source is Debian's archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// debian.org, or signed with Debian's key.
    Debian,
    /// It looks like a mirror.
    Mirror,
    /// Something else.
    Other,
}

/// The lists of sources to try, the best first: each is the content of a deb822 file.
///
/// `etc_apt` is the folder of `sources.list`; `os_release` what `/etc/os-release` says.
pub fn candidates(etc_apt: &Path, os_release: &str) -> Vec<String> {
    let mut lists = Vec::new();
    if let Some(release) = debian_release(os_release) {
        let sources = read_system(etc_apt);
        let fitting: Vec<Source> = sources.iter().filter_map(|source| source.of_release(&release)).collect();
        let mirrors: Vec<&Source> =
            fitting.iter().filter(|source| source.origin() != Origin::Other).collect();
        let sure: Vec<&Source> = mirrors.iter().copied().filter(|s| s.origin() == Origin::Debian).collect();
        lists.extend([mirrors, sure].into_iter().filter_map(|list| rendered(&list, &release)));
    }
    lists.push(fallback());
    let mut seen = BTreeSet::new();
    lists.retain(|list| seen.insert(list.clone()));
    lists
}

/// deb.debian.org with Debian's key.
fn fallback() -> String {
    let source = |path: &str, suites: &[String]| Source {
        uris: vec![format!("http://deb.debian.org/{path}")],
        suites: suites.to_vec(),
        options: vec![("Signed-By".to_owned(), KEYRING.to_owned())],
    };
    let main = source("debian", &[RELEASE.to_owned(), format!("{RELEASE}-updates")]);
    let security = source("debian-security", &[format!("{RELEASE}-security")]);
    format!("{}\n{}", main.deb822(), security.deb822())
}

/// The release's code name, where the system is Debian.
fn debian_release(os_release: &str) -> Option<String> {
    let field = |name: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim().trim_matches(['"', '\'']).to_owned())
    };
    if field("ID")? != "debian" {
        return None;
    }
    field("VERSION_CODENAME").filter(|name| !name.is_empty())
}

/// The sources as deb822, where one of them has the release itself.
fn rendered(sources: &[&Source], release: &str) -> Option<String> {
    let is_main = |suite: &String| suite == release || is_alias(suite);
    sources.iter().any(|source| source.suites.iter().any(is_main)).then(|| {
        let texts: Vec<String> = sources.iter().map(|source| source.deb822()).collect();
        texts.join("\n")
    })
}

/// Whether a suite is called by its state instead of its name.
fn is_alias(suite: &str) -> bool {
    matches!(suite, "stable" | "testing" | "unstable" | "sid" | "oldstable" | "oldoldstable")
}

impl Source {
    /// What of the source has the release or its updates.
    fn of_release(&self, release: &str) -> Option<Self> {
        let fits = |suite: &&String| {
            let base = ["-updates", "-security", "/updates"].iter().find_map(|end| suite.strip_suffix(end));
            let base = base.unwrap_or(suite);
            base == release || is_alias(base)
        };
        let suites: Vec<String> = self.suites.iter().filter(fits).cloned().collect();
        let fetchable = |uri: &&String| !uri.starts_with("cdrom:");
        let uris: Vec<String> = self.uris.iter().filter(fetchable).cloned().collect();
        let usable = !suites.is_empty() && !uris.is_empty();
        usable.then(|| Self { uris, suites, options: self.options.clone() })
    }

    fn origin(&self) -> Origin {
        let keyring =
            |(name, value): &(String, String)| name == "Signed-By" && value.contains("debian-archive");
        if self.options.iter().any(keyring) {
            return Origin::Debian;
        }
        let is_debian = |uri: &String| {
            let host = uri.split_once("://").and_then(|(_, rest)| rest.split('/').next()).unwrap_or_default();
            host == "debian.org" || host.ends_with(".debian.org")
        };
        let looks_like = |uri: &String| {
            let folder = uri.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            matches!(folder, "debian" | "debian-security")
        };
        if self.uris.iter().all(is_debian) {
            Origin::Debian
        } else if self.uris.iter().all(|uri| is_debian(uri) || looks_like(uri)) {
            Origin::Mirror
        } else {
            Origin::Other
        }
    }

    fn deb822(&self) -> String {
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nArchitectures: amd64\n",
            self.uris.join(" "),
            self.suites.join(" ")
        );
        for (name, value) in &self.options {
            text.push_str(&format!("{name}: {value}\n"));
        }
        text
    }
}

/// All sources of binary packages with the component `main`, in the order in which apt reads them.
fn read_system(etc_apt: &Path) -> Vec<Source> {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(folder) = fs::read_dir(etc_apt.join("sources.list.d")) {
        let mut parts: Vec<PathBuf> = folder.flatten().map(|entry| entry.path()).collect();
        parts.sort();
        files.extend(parts);
    }
    let mut sources = Vec::new();
    for file in files {
        let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let small = fs::metadata(&file).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE);
        let Some(text) = small.then(|| fs::read(&file).ok()).flatten() else { continue };
        let text = String::from_utf8_lossy(&text);
        match ending {
            "list" => sources.extend(text.lines().filter_map(parse_line)),
            "sources" => sources.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// `deb [option=value …] uri suite component …`.
fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let mut rest = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t', '[']))?.trim_start();
    let mut options = Vec::new();
    if let Some(inside) = rest.strip_prefix('[') {
        let (inside, after) = inside.split_once(']')?;
        for option in inside.split_whitespace() {
            let (name, value) = option.split_once('=')?;
            options.push((name.to_owned(), value.replace(',', " ")));
        }
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    let (uri, suite) = (words.next()?, words.next()?);
    words.any(|word| word == "main").then(|| checked(vec![uri], vec![suite], options)).flatten()
}

/// Paragraphs of `Field: value`, whose values may go on in indented lines.
fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.trim().is_empty() {
            sources.extend(source_of_fields(&std::mem::take(&mut fields)));
        } else if line.starts_with('#') {
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    sources
}

fn source_of_fields(fields: &[(String, String)]) -> Option<Source> {
    let field =
        |wanted: &str| fields.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|f| &f.1);
    let words =
        |name| field(name).map(|value| value.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    let disabled =
        field("Enabled").is_some_and(|value| matches!(value.to_lowercase().as_str(), "no" | "false" | "0"));
    let has = |name, word: &str| words(name).unwrap_or_default().iter().any(|value| value == word);
    if disabled || !has("Types", "deb") || !has("Components", "main") {
        return None;
    }
    checked(words("URIs")?, words("Suites")?, fields.to_vec())
}

/// A source with the options that are kept, where it is for this architecture.
fn checked(uris: Vec<String>, suites: Vec<String>, options: Vec<(String, String)>) -> Option<Source> {
    let foreign = |(name, value): &(String, String)| {
        let names_all = name.eq_ignore_ascii_case("arch") || name.eq_ignore_ascii_case("architectures");
        names_all && !value.split_whitespace().any(|arch| arch == "amd64")
    };
    if options.iter().any(foreign) {
        return None;
    }
    let kept = options.into_iter().filter_map(|(name, value)| {
        let spelling = KEPT_OPTIONS.iter().find(|kept| kept.eq_ignore_ascii_case(&name))?;
        Some(((*spelling).to_owned(), value))
    });
    Some(Source { uris, suites, options: kept.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOKWORM: &str = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\nVERSION_CODENAME=bookworm\n";

    fn candidates_of(files: &[(&str, &str)], os_release: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sources.list.d")).unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        candidates(folder.path(), os_release)
    }

    #[test]
    fn the_systems_debian_sources_come_first_with_their_keys_and_third_parties_are_left_out() {
        let lists = candidates_of(
            &[
                ("sources.list", "# old\ndeb-src http://deb.debian.org/debian bookworm main\n"),
                (
                    "sources.list.d/debian.sources",
                    "Types: deb deb-src\n# a comment\nURIs: http://deb.debian.org/debian\nSuites: bookworm bookworm-updates \
                     bookworm-backports\nComponents: main contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
                ),
                (
                    "sources.list.d/cloud.list",
                    "deb https://packages.cloud.google.com/apt cloud-sdk-bookworm main",
                ),
                ("sources.list.d/php.list", "deb https://packages.sury.org/php/ bookworm main"),
            ],
            BOOKWORM,
        );
        assert_eq!(
            lists[0],
            "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\
             Architectures: amd64\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
        assert_eq!(lists.len(), 2, "{lists:?}");
        assert!(lists[1].contains("bookworm-security"));
    }

    #[test]
    fn a_mirror_is_used_first_and_tried_without_where_it_fails() {
        let lists = candidates_of(
            &[(
                "sources.list",
                "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main\n\
                 deb http://security.debian.org/debian-security bookworm-security main\n\
                 deb http://deb.debian.org/debian bookworm main # the real one\n\
                 deb cdrom:[Debian]/ bookworm main\n\
                 deb [arch=arm64] http://deb.debian.org/debian bookworm main\n",
            )],
            BOOKWORM,
        );
        assert_eq!(lists.len(), 3);
        assert!(lists[0].contains("mirror.example/debian/") && lists[0].contains("Signed-By: /k.gpg"));
        assert!(!lists[1].contains("mirror.example") && lists[1].contains("security.debian.org"));
        assert!(lists.iter().all(|list| !list.contains("cdrom")));
    }

    #[test]
    fn a_system_without_a_usable_source_gets_debians_own() {
        let broken = "Types: deb\nURIs\n: :\n   \nSuites bookworm\n";
        for (files, os) in [
            (vec![], BOOKWORM),
            (vec![("sources.list.d/broken.sources", broken)], BOOKWORM),
            (vec![("sources.list", "deb http://archive.ubuntu.com/ubuntu noble main")], "ID=ubuntu\n"),
            (
                vec![("sources.list", "deb http://deb.debian.org/debian-security bookworm-security main")],
                BOOKWORM,
            ),
            (vec![("sources.list", "deb [x http://deb.debian.org/debian bookworm main")], BOOKWORM),
        ] {
            let lists = candidates_of(&files, os);
            assert_eq!(lists, [fallback()], "{files:?}");
        }
    }

    #[test]
    fn a_disabled_source_is_left_out_and_an_embedded_key_is_kept_whole() {
        let text = "Enabled: no\nTypes: deb\nURIs: http://a.debian.org/debian\nSuites: bookworm\nComponents: main\n\n\
                    Types: deb\nURIs: http://b.debian.org/debian\nSuites: stable\nComponents: main\nSigned-By:\n -----BEGIN\n .\n";
        let lists = candidates_of(&[("sources.list.d/x.sources", text)], BOOKWORM);
        assert!(!lists[0].contains("a.debian.org"));
        assert!(lists[0].contains("Suites: stable\n") && lists[0].contains("Signed-By: \n -----BEGIN\n .\n"));
    }
}
