//! Fetching packages through apt as an ordinary user: its own state and cache folders, the system's proxies, keys and
//! configuration. apt checks signatures and hashes as always; nothing is installed.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::child::Group;
use super::{Guest, GuestError, Progress, sources};

/// What apt may say on its error output, in bytes: the last of it is what counts.
const MAX_MESSAGE: u64 = 1 << 20;

/// Settings over the system's: no hooks (they would act on the system), and only the lists that are needed.
const CONFIGURATION: &str = "
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large-hidpi;
#clear Acquire::IndexTargets::deb::Contents-deb;
#clear APT::Architectures;
APT::Architecture \"amd64\";
APT::Architectures { \"amd64\"; };
Acquire::Languages \"none\";
Acquire::Retries \"2\";
APT::Get::AllowUnauthenticated \"false\";
";

/// A package on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Bytes.
    pub size: u64,
    /// The SHA-256 that the signed list gives, which apt has checked.
    pub sha256: String,
    /// The file.
    pub file: PathBuf,
}

/// The packages of a guest.
#[derive(Clone, Debug)]
pub struct Packages {
    /// The kernel with its modules.
    pub kernel: Package,
    /// The static busybox.
    pub busybox: Package,
}

/// Fetches a guest's packages into `folder`, which is this call's own.
///
/// # Errors
/// [`GuestError::NoApt`], [`GuestError::NoKeyring`], [`GuestError::Apt`] with what apt says, and
/// [`GuestError::Package`] where the archive does not have what is expected.
pub fn fetch(guest: &Guest, folder: &Path, progress: &mut dyn Progress) -> Result<Packages, GuestError> {
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let lists = sources::candidates(Path::new("/etc/apt"), &os_release);
    let apt = Apt::new(folder)?;
    apt.update(&lists, progress)?;
    let meta = apt.show(guest.kernel)?;
    let kernel = apt.show(&kernel_of(guest.kernel, &meta)?)?;
    let busybox = apt.show(guest.busybox)?;
    let mut package = |record| apt.download(record, progress);
    Ok(Packages { kernel: package(&kernel)?, busybox: package(&busybox)? })
}

/// Fetches packages by their names into `folder`, which is this call's own.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_named(
    names: &[&str],
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<Vec<Package>, GuestError> {
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let lists = sources::candidates(Path::new("/etc/apt"), &os_release);
    let apt = Apt::new(folder)?;
    apt.update(&lists, progress)?;
    names.iter().map(|name| apt.download(&apt.show(name)?, progress)).collect()
}

/// A package that was fetched as a dependency or by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The file.
    pub file: PathBuf,
}

/// How long the package lists are used before they are read anew.
const LISTS_FRESH: Duration = Duration::from_secs(24 * 3600);

/// Fetches packages and all that they depend on into `folder`, where what is there already is used again. No other
/// call may work on that folder.
///
/// # Errors
/// [`GuestError::Apt`] with apt's sentence for a package that there is not; otherwise as [`fetch`].
pub fn fetch_with_dependencies(
    names: &[String],
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<Vec<Fetched>, GuestError> {
    check_names(names)?;
    let wanted = Wanted { names, patterns: &[], what: names.join(", ") };
    with_lists(folder, progress, |apt, progress| apt.download_all(&wanted, progress))
}

/// The packages of a whole system, in an order in which they can be unpacked.
#[derive(Clone, Debug)]
pub struct System {
    /// All of them.
    pub packages: Vec<Fetched>,
    /// The names of those that dpkg itself needs: the essential ones and what they depend on.
    pub essential: Vec<String>,
}

/// Fetches a system: the essential and required packages, those of `names`, and what all of them depend on. Otherwise
/// as [`fetch_with_dependencies`].
///
/// # Errors
/// As [`fetch_with_dependencies`].
pub fn fetch_system(
    names: &[String],
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<System, GuestError> {
    check_names(names)?;
    let all =
        Wanted { names, patterns: &["?essential", "?priority(required)"], what: "Debian's packages".into() };
    // What merges /bin with /usr/bin is not needed where they never were apart.
    let merged = [MERGED_ALREADY.to_owned()];
    let essential =
        Wanted { names: &merged, patterns: &["?essential"], what: "the essential packages".into() };
    with_lists(folder, progress, |apt, progress| {
        let packages = apt.download_all(&all, progress)?;
        let essential = apt.plan(&essential)?.into_iter().map(|package| package.name).collect();
        Ok(System { packages, essential })
    })
}

/// The package that stands for a system whose `/bin` is `/usr/bin`.
pub const MERGED_ALREADY: &str = "usr-is-merged";

fn check_names(names: &[String]) -> Result<(), GuestError> {
    match names.iter().find(|name| !is_package_name(name)) {
        Some(name) => Err(GuestError::package(name, "this is no package's name")),
        None => Ok(()),
    }
}

/// Reads the package lists where those in `folder` are old, and does `get`; once more with new ones where that fails.
fn with_lists<T>(
    folder: &Path,
    progress: &mut dyn Progress,
    mut get: impl FnMut(&Apt<'_>, &mut dyn Progress) -> Result<T, GuestError>,
) -> Result<T, GuestError> {
    let apt = Apt::new(folder)?;
    let stamp = folder.join("updated");
    let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
    let mut fresh = false;
    loop {
        if fresh || age.is_none_or(|age| age > LISTS_FRESH) {
            let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
            apt.update(&sources::candidates(Path::new("/etc/apt"), &os_release), progress)?;
            apt.write("updated", "")?;
            fresh = true;
        }
        match get(&apt, progress) {
            // The archive may have newer ones than the lists say.
            Err(GuestError::Apt { .. }) if !fresh => fresh = true,
            result => return result,
        }
    }
}

/// What apt is asked for.
struct Wanted<'a> {
    names: &'a [String],
    /// apt's patterns, apt-patterns(7).
    patterns: &'a [&'a str],
    /// For messages.
    what: String,
}

/// The package `linux-image-VERSION` that the metapackage depends on.
fn kernel_of(metapackage: &str, record: &Record) -> Result<String, GuestError> {
    let depends = record.depends.as_deref().unwrap_or_default();
    depends
        .split([',', '|'])
        .filter_map(|dependency| dependency.split_whitespace().next())
        .find(|name| name.starts_with("linux-image-") && is_package_name(name))
        .map(str::to_owned)
        .ok_or_else(|| GuestError::package(metapackage, format!("it depends on no kernel: {depends:?}")))
}

/// Debian Policy, *The fields Source and Package*: nothing that apt could take for an option.
fn is_package_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '+' | '-' | '.');
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain)
}

/// What apt knows of a package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Record {
    name: String,
    version: String,
    size: u64,
    sha256: String,
    depends: Option<String>,
}

/// Reads the first paragraph of what `apt-cache show` prints.
fn parse_record(text: &str) -> Option<Record> {
    let paragraph = text.trim_start().split("\n\n").next()?;
    let field = |name: &str| {
        let value = paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))?;
        Some(value.trim().to_owned())
    };
    Some(Record {
        name: field("Package").filter(|name| is_package_name(name))?,
        version: field("Version").filter(|version| !version.contains(char::is_whitespace))?,
        size: field("Size")?.parse().ok()?,
        sha256: field("SHA256")?,
        depends: field("Depends"),
    })
}

/// apt with folders of its own.
struct Apt<'a> {
    folder: &'a Path,
}

impl<'a> Apt<'a> {
    fn new(folder: &'a Path) -> Result<Self, GuestError> {
        for below in ["state/lists/partial", "cache/archives/partial", "packages"] {
            let path = folder.join(below);
            fs::create_dir_all(&path).map_err(GuestError::file("create", &path))?;
        }
        let apt = Self { folder };
        apt.write("apt.conf", CONFIGURATION)?;
        apt.write("status", "")?;
        Ok(apt)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), GuestError> {
        let path = self.folder.join(name);
        fs::write(&path, text).map_err(GuestError::file("write", &path))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.folder.join("apt.conf"));
        for (name, path) in [
            ("Dir::State", "state"),
            ("Dir::State::lists", "state/lists"),
            ("Dir::State::status", "status"),
            ("Dir::State::extended_states", "state/extended_states"),
            ("Dir::Cache", "cache"),
            ("Dir::Cache::archives", "cache/archives"),
            ("Dir::Etc::sourcelist", "debian.sources"),
        ] {
            let mut option = std::ffi::OsString::from(format!("-o{name}="));
            option.push(self.folder.join(path));
            command.arg(option);
        }
        // Some images switch the binary cache off, which would parse the lists at every call.
        command.args(["-oDir::Etc::sourceparts=-", "-oDir::Cache::pkgcache=pkgcache.bin"]);
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Reads the package lists from the first of `lists` that works.
    fn update(&self, lists: &[String], progress: &mut dyn Progress) -> Result<(), GuestError> {
        let mut failure = None;
        for list in lists {
            self.write("debian.sources", list)?;
            progress.begin("Reading Debian's package lists", None);
            let mut command = self.command("apt-get");
            command.args(["-qq", "-oAPT::Update::Error-Mode=any", "update"]);
            let result = run(&mut command, "apt-get", "read Debian's package lists", |_| {});
            progress.end();
            match result {
                Ok(_) => return Ok(()),
                Err(error @ GuestError::Apt { .. }) => {
                    // The system's own sources are what its user knows: their failure is the one to tell.
                    let keyring = Path::new(sources::KEYRING);
                    let missing = list.contains(sources::KEYRING) && !keyring.exists();
                    failure.get_or_insert(match missing {
                        true => GuestError::NoKeyring { keyring: keyring.to_owned() },
                        false => error,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        Err(failure.unwrap_or_else(|| GuestError::package("sources", "there are none")))
    }

    /// What the lists say of a package.
    fn show(&self, name: &str) -> Result<Record, GuestError> {
        let mut command = self.command("apt-cache");
        command.args(["--no-all-versions", "show", name]);
        let text = run(&mut command, "apt-cache", &format!("find the package {name}"), |_| {})?;
        parse_record(&text).ok_or_else(|| GuestError::package(name, "Debian's lists do not describe it"))
    }

    fn install(&self, wanted: &Wanted<'_>, options: &[&str]) -> Command {
        let mut command = self.command("apt-get");
        command.args(["-qq", "-y", "--no-install-recommends", "-oDebug::NoLocking=1"]).args(options);
        command.arg("install").args(wanted.patterns).args(wanted.names);
        command
    }

    /// The packages with their dependencies, in the order in which apt would unpack them.
    fn plan(&self, wanted: &Wanted<'_>) -> Result<Vec<Fetched>, GuestError> {
        let what = format!("fetch {}", wanted.what);
        let plan = run(&mut self.install(wanted, &["--simulate"]), "apt-get", &what, |_| {})?;
        let archives = self.folder.join("cache/archives");
        let planned = plan.lines().filter_map(planned_package);
        let packages = planned.map(|(name, version, architecture)| {
            let file = format!("{name}_{}_{architecture}.deb", version.replace(':', "%3a"));
            Fetched { name, version, file: archives.join(file) }
        });
        Ok(packages.collect())
    }

    /// Downloads packages with their dependencies, which apt compares with the hashes in the signed lists.
    fn download_all(
        &self,
        wanted: &Wanted<'_>,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Fetched>, GuestError> {
        let packages = self.plan(wanted)?;
        let what = format!("fetch {}", wanted.what);
        let missing = run(&mut self.install(wanted, &["--print-uris"]), "apt-get", &what, |_| {})?;
        let bytes: u64 = missing.lines().filter_map(listed_size).sum();
        if bytes > 0 {
            progress.begin(&format!("Fetching {} with what they need", wanted.what), Some(bytes));
            let mut download = self.install(wanted, &["--download-only", "-oAPT::Status-Fd=1"]);
            let result = run(&mut download, "apt-get", &what, |line| {
                if let Some(percent) = download_percent(line) {
                    progress.advance((bytes as f64 * percent / 100.0) as u64);
                }
            });
            progress.end();
            result?;
        }
        match packages.iter().find(|package| !package.file.exists()) {
            Some(package) => {
                Err(GuestError::package(&package.name, "apt fetched it, but the file is not there"))
            }
            None => Ok(packages),
        }
    }

    /// Downloads a package; apt compares it with the hash in the signed list.
    fn download(&self, record: &Record, progress: &mut dyn Progress) -> Result<Package, GuestError> {
        let folder = self.folder.join("packages");
        let mut command = self.command("apt-get");
        command.args(["-qq", "-oAPT::Status-Fd=1", "download"]);
        command.arg(format!("{}={}", record.name, record.version)).current_dir(&folder);
        progress.begin(&format!("Fetching {} {}", record.name, record.version), Some(record.size));
        let what = format!("fetch {} {}", record.name, record.version);
        let result = run(&mut command, "apt-get", &what, |line| {
            if let Some(percent) = download_percent(line) {
                progress.advance((record.size as f64 * percent / 100.0) as u64);
            }
        });
        progress.end();
        result?;
        let prefix = format!("{}_", record.name);
        let file = find_file(&folder, &prefix)?
            .ok_or_else(|| GuestError::package(&record.name, "apt fetched it, but the file is not there"))?;
        let size = fs::metadata(&file).map_err(GuestError::file("read", &file))?.len();
        if size != record.size {
            let reason = format!("it has {size} bytes, not the {} that Debian's list gives", record.size);
            return Err(GuestError::package(&record.name, reason));
        }
        let Record { name, version, sha256, .. } = record.clone();
        Ok(Package { name, version, size, sha256, file })
    }
}

/// What `apt-get --simulate` would install: `Inst NAME (VERSION ORIGIN [ARCHITECTURE])`, with what it waits for behind.
fn planned_package(line: &str) -> Option<(String, String, String)> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
    let inner = rest.split(')').next()?;
    let version = inner.split_whitespace().next()?;
    let architecture = inner.rsplit_once('[')?.1.strip_suffix(']')?;
    let plain = |text: &str| !text.is_empty() && !text.contains(['/', ' ']);
    let name = name.split_once(':').map_or(name, |(name, _)| name);
    (is_package_name(name) && plain(version) && plain(architecture))
        .then(|| (name.to_owned(), version.to_owned(), architecture.to_owned()))
}

/// The size in a line of `apt-get --print-uris`: `'URI' FILE SIZE HASH`.
fn listed_size(line: &str) -> Option<u64> {
    line.strip_prefix('\'')?.split_once("' ")?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The share that apt says it has: `dlstatus:1:42.5:Retrieving file 1 of 1`.
fn download_percent(line: &str) -> Option<f64> {
    let mut fields = line.strip_prefix("dlstatus:")?.split(':');
    fields.nth(1)?.parse().ok().filter(|percent| (0.0..=100.0).contains(percent))
}

fn find_file(folder: &Path, prefix: &str) -> Result<Option<PathBuf>, GuestError> {
    let entries = fs::read_dir(folder).map_err(GuestError::file("read", folder))?;
    Ok(entries.flatten().map(|entry| entry.path()).find(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
    }))
}

/// Runs one of apt's programs to its end: what it printed; `on_line` sees each line as it comes.
fn run(
    command: &mut Command,
    program: &'static str,
    what: &str,
    mut on_line: impl FnMut(&str),
) -> Result<String, GuestError> {
    let failed = |message: String| GuestError::Apt { what: what.to_owned(), message };
    let mut child = Group::spawn(command).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => GuestError::NoApt { program },
        _ => failed(error.to_string()),
    })?;
    let errors = child.stderr().map(|stderr| std::thread::spawn(move || read_some(stderr)));
    let mut output = String::new();
    let read = read_lines(child.stdout(), |line| {
        on_line(line);
        if (output.len() as u64) < MAX_MESSAGE {
            output.push_str(line);
            output.push('\n');
        }
    });
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    let errors = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
    read.map_err(|error| failed(error.to_string()))?;
    if status.success() {
        return Ok(output);
    }
    let said = meaningful(&errors);
    Err(failed(if said.is_empty() { format!("it ended with {status}") } else { said }))
}

fn read_lines(output: Option<impl Read>, mut on_line: impl FnMut(&str)) -> io::Result<()> {
    let Some(output) = output else { return Ok(()) };
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    while reader.by_ref().take(MAX_MESSAGE).read_until(b'\n', &mut line)? != 0 {
        on_line(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
        line.clear();
    }
    Ok(())
}

/// Reads to the end, and keeps the beginning.
fn read_some(mut reader: impl Read) -> String {
    let mut kept = Vec::new();
    let _ = reader.by_ref().take(MAX_MESSAGE).read_to_end(&mut kept);
    let _ = io::copy(&mut reader, &mut io::sink());
    String::from_utf8_lossy(&kept).into_owned()
}

/// apt's errors without its warnings, where there are errors; at most ten lines.
fn meaningful(text: &str) -> String {
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let errors: Vec<&str> = lines().filter(|line| line.starts_with("E:")).take(10).collect();
    if errors.is_empty() { lines().take(10).collect::<Vec<_>>().join("\n") } else { errors.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_and_names_that_could_be_options_are_refused() {
        let text = "Package: linux-image-amd64\nVersion: 6.1.1-2\nSize: 12\nSHA256: ab\nDepends: a (>= 1), \
                    linux-image-6.1.0-1-amd64 (= 6.1.1-2)\n\nPackage: other\nVersion: 1\n";
        let record = parse_record(text).unwrap();
        assert_eq!((record.version.as_str(), record.size), ("6.1.1-2", 12));
        assert_eq!(kernel_of("linux-image-amd64", &record).unwrap(), "linux-image-6.1.0-1-amd64");
        assert!(parse_record(&text.replace("linux-image-amd64", "--option")).is_none());
        assert!(parse_record("Package: a\nVersion: 1\nSize: -1\nSHA256: x").is_none());
        assert!(parse_record("").is_none());
        assert!(kernel_of("m", &Record::default()).unwrap_err().to_string().contains("no kernel"));
    }

    #[test]
    fn what_apt_plans_is_read_line_by_line() {
        let line = "Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable, Debian-Security:12/x [amd64]) [libgcc-s1:amd64 ]";
        let planned =
            |line| planned_package(line).map(|(name, version, of)| format!("{name} {version} {of}"));
        assert_eq!(planned(line).as_deref(), Some("libc6 2.36-9+deb12u14 amd64"));
        assert_eq!(
            planned("Inst media-types (10.0.0 Debian:12 [all])").as_deref(),
            Some("media-types 10.0.0 all")
        );
        assert_eq!(planned("Inst x (1/../2 Debian [all])"), None);
        assert_eq!(planned("Conf libc6 (2.36 Debian [amd64])"), None);
        assert_eq!(listed_size("'http://a/b_1%2b_amd64.deb' b_1+_amd64.deb 37472 MD5Sum:85"), Some(37472));
        assert_eq!(listed_size("Reading package lists..."), None);
    }

    #[test]
    fn a_name_that_apt_could_take_for_an_option_is_refused_before_apt_runs() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["--purge", "a b", "x/stable", "x=1", "", "Upper"] {
            let names = [name.to_owned()];
            let error =
                fetch_with_dependencies(&names, folder.path(), &mut super::super::Silent).unwrap_err();
            assert!(error.to_string().contains("no package's name"), "{name}: {error}");
        }
    }

    #[test]
    fn progress_is_read_from_apts_status_lines() {
        assert_eq!(download_percent("dlstatus:2:7.4229:Retrieving file 2 of 3"), Some(7.4229));
        assert_eq!(download_percent("dlstatus:2:nan:x"), None);
        assert_eq!(download_percent("dlstatus:1:-5:x"), None);
        assert_eq!(download_percent("Get:1 http://deb.debian.org"), None);
    }

    #[test]
    fn a_missing_program_says_how_to_go_without() {
        let error = run(&mut Command::new("/nonexistent/apt-get"), "apt-get", "x", |_| {}).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, GuestError::NoApt { .. }));
        assert!(text.contains("--kernel FILE") && text.contains("--initrd FILE"), "{text}");
    }

    #[test]
    fn a_failing_program_gives_its_errors_and_not_its_warnings() {
        let shell = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]).stdout(Stdio::piped()).stderr(Stdio::piped());
            run(&mut command, "sh", "do it", |_| {})
        };
        let error = shell("echo 'W: old' >&2; echo 'E: No space left on device' >&2; exit 100").unwrap_err();
        assert_eq!(error.to_string(), "apt could not do it:\nE: No space left on device");
        let error = shell("kill -9 $$").unwrap_err().to_string();
        assert!(error.contains("signal: 9"), "{error}");
        assert_eq!(shell("echo a; echo b >&2").unwrap(), "a\n");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Apt::new(file.path()).err().unwrap().to_string();
        assert!(error.contains("cannot create"), "{error}");
    }

    /// A package archive on the disk, whose only package is `bytes`; `listed` is what its list says that it is.
    fn archive(folder: &Path, bytes: &[u8], listed: &[u8]) -> String {
        use sha2::{Digest, Sha256};
        let sum: String = Sha256::digest(listed).iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!(
            "Package: linux-image-1-amd64\nVersion: 1:2+b3\nArchitecture: amd64\nMaintainer: a\nDescription: a\n\
             Filename: ./k.deb\nSize: {}\nSHA256: {sum}\n",
            listed.len()
        );
        fs::write(folder.join("Packages"), list).unwrap();
        fs::write(folder.join("k.deb"), bytes).unwrap();
        format!("Types: deb\nURIs: copy:{}\nSuites: ./\nTrusted: yes\n", folder.display())
    }

    /// Downloads the package of such an archive with apt; `None` where there is no apt.
    fn downloaded(bytes: &[u8], listed: &[u8]) -> Option<Result<(Package, Vec<u8>), GuestError>> {
        Command::new("apt-get").arg("--version").stdout(Stdio::null()).status().ok()?;
        let (repository, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = archive(repository.path(), bytes, listed);
        let nowhere = "Types: deb\nURIs: copy:/nonexistent\nSuites: ./\nTrusted: yes\n".to_owned();
        let apt = Apt::new(own.path()).unwrap();
        apt.update(&[nowhere, source], &mut super::super::Silent).unwrap();
        let record = apt.show("linux-image-1-amd64").unwrap();
        assert!(matches!(apt.show("no-such-package"), Err(GuestError::Apt { .. })));
        Some(apt.download(&record, &mut super::super::Silent).map(|package| {
            let bytes = fs::read(&package.file).unwrap();
            (package, bytes)
        }))
    }

    #[test]
    fn a_package_comes_through_apt_from_the_first_source_that_works() {
        let Some(result) = downloaded(b"some package", b"some package") else { return };
        let (package, bytes) = result.unwrap();
        assert_eq!((package.version.as_str(), bytes.as_slice()), ("1:2+b3", &b"some package"[..]));
    }

    #[test]
    fn a_package_that_is_cut_or_changed_is_refused_by_apt() {
        for bytes in [&b"some pack"[..], b"some PACKAGE", b""] {
            let Some(result) = downloaded(bytes, b"some package") else { return };
            let error = result.unwrap_err().to_string();
            assert!(error.contains("apt could not fetch linux-image-1-amd64"), "{error}");
        }
    }
}
