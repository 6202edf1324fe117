//! Real programs, from Debian's packages: the same files natively and in the guest.
//!
//! The guest has them in its initramfs as `ringside run --package` puts them there. Natively the same archive is unpacked
//! into a folder, and each program is started through the loader and with the libraries in it (in the guest as well).

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use ringside::guest::{self, GuestFiles, software};

use crate::workloads::{Kind, Workload};

/// Where the programs come from; `cpp` has the compiler proper.
const PACKAGES: &[&str] = &["cpp", "gzip", "openssl", "python3", "sqlite3", "xz-utils"];
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
const LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// Functions of the large C file.
const FUNCTIONS: usize = 80;
/// Lines of the text that is compressed.
const LINES: usize = 24_000;

/// The programs on the host, and what they work on.
pub struct Programs {
    /// The guest's initramfs with the packages.
    pub initrd: PathBuf,
    /// Bytes of the packages there.
    pub bytes: u64,
    /// The folder that is `/` to them natively.
    root: PathBuf,
    /// The folder with what they work on, and the names of the files there.
    data: PathBuf,
    files: Vec<&'static str>,
}

impl Programs {
    /// Fetches the packages, unpacks them for the host below `folder` and makes what the programs work on.
    ///
    /// # Errors
    /// Where the packages cannot be had, or `folder` cannot be written.
    pub fn prepare(name: &str, guest: &GuestFiles, folder: &Path) -> anyhow::Result<Self> {
        let packages: Vec<String> = PACKAGES.iter().map(|&name| name.to_owned()).collect();
        let software = software::with_packages(name, guest, &packages, &mut *guest::to_stderr())?;
        let (root, data) = (folder.join("root"), folder.join("data"));
        for folder in [&root, &data] {
            fs::create_dir(folder)?;
        }
        let mut archive = File::open(&software.initrd)?;
        archive.seek(SeekFrom::Start(fs::metadata(&guest.initrd)?.len()))?;
        unpack(BufReader::new(archive), &root).context("cannot unpack the packages")?;
        let mut programs =
            Self { initrd: software.initrd, bytes: software.bytes, root, data, files: Vec::new() };
        programs.make_files()?;
        Ok(programs)
    }

    /// What the programs work on, by name.
    ///
    /// # Errors
    /// Where a file cannot be read.
    pub fn files(&self) -> io::Result<Vec<(&'static str, Vec<u8>)>> {
        self.files.iter().map(|&name| Ok((name, fs::read(self.data.join(name))?))).collect()
    }

    /// A workload's words for the workload program, natively.
    ///
    /// # Errors
    /// Where the packages do not have its program.
    pub fn native(&self, program: &Path, workload: &Workload, seconds: f64) -> anyhow::Result<Command> {
        let mut command = Command::new(program);
        command.arg(seconds.to_string()).arg(workload.name).args(self.words(workload.kind, &self.root)?);
        for (name, value) in environment(&self.root.to_string_lossy()) {
            command.env(name, value);
        }
        command.current_dir(&self.data);
        Ok(command)
    }

    /// The same in the guest, as words for a shell.
    ///
    /// # Errors
    /// As [`Self::native`].
    pub fn in_guest(&self, workload: &Workload) -> anyhow::Result<String> {
        let words = self.words(workload.kind, Path::new("/"))?;
        Ok(words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "))
    }

    /// What the workload program is told of a program: nothing of one that it is itself.
    fn words(&self, kind: Kind, root: &Path) -> anyhow::Result<Vec<String>> {
        let (how, words) = match kind {
            Kind::BuiltIn => return Ok(Vec::new()),
            Kind::Program(words) => ("run", words),
            Kind::Speed(words) => ("speed", words),
        };
        let (program, arguments) = words.split_first().context("a program without a name")?;
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let own = self.started(root, program)?.into_iter().map(text);
        let arguments = arguments.iter().map(|&word| word.to_owned());
        Ok([how.to_owned()].into_iter().chain(own).chain(arguments).collect())
    }

    /// A program through its loader.
    fn started(&self, root: &Path, program: &str) -> anyhow::Result<[PathBuf; 4]> {
        let program = found(&self.root, program)?;
        Ok([root.join(LOADER), "--library-path".into(), root.join(LIBRARIES), root.join(program)])
    }

    fn make_files(&mut self) -> anyhow::Result<()> {
        let inputs = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/guest/inputs");
        for name in ["bench.py", "bench.sql"] {
            fs::copy(inputs.join(name), self.data.join(name))?;
            self.files.push(name);
        }
        self.write("large.c", large_c().as_bytes())?;
        self.write("text", text().as_bytes())?;
        for (name, program) in [("text.gz", "bin/gzip"), ("text.xz", "bin/xz")] {
            let packed = self.output(program, &["-c", "-3", "text"])?;
            self.write(name, &packed)?;
        }
        Ok(())
    }

    fn write(&mut self, name: &'static str, bytes: &[u8]) -> io::Result<()> {
        self.files.push(name);
        fs::write(self.data.join(name), bytes)
    }

    /// What a program prints natively.
    fn output(&self, program: &str, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
        let [loader, option, libraries, path] = self.started(&self.root, program)?;
        let mut command = Command::new(loader);
        command.arg(option).arg(libraries).arg(path).args(arguments).current_dir(&self.data);
        let output = command.stdin(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(output.stdout)
    }
}

/// What programs find in their environment, where `root` is theirs.
pub fn environment(root: &str) -> [(&'static str, String); 2] {
    [("PYTHONHOME", format!("{root}/usr")), ("OPENSSL_CONF", "/dev/null".to_owned())]
}

/// A program's path below `root`, whose `*` stands for a folder that is there: the compiler's is called by its version.
fn found(root: &Path, program: &str) -> anyhow::Result<PathBuf> {
    let Some((folder, rest)) = program.split_once("/*/") else { return Ok(program.into()) };
    let entries = fs::read_dir(root.join(folder)).with_context(|| format!("there is no {folder}"))?;
    let names = entries.flatten().map(|entry| Path::new(folder).join(entry.file_name()).join(rest));
    let mut there: Vec<PathBuf> = names.filter(|path| root.join(path).is_file()).collect();
    there.sort();
    there.pop().with_context(|| format!("the packages have no {program}"))
}

/// Unpacks folders, files and links of the archive, whose links are those of a whole system, to below `root`.
fn unpack(mut archive: impl Read, root: &Path) -> io::Result<()> {
    loop {
        let mut reader = cpio::newc::Reader::new(archive)?;
        let entry = reader.entry();
        if entry.is_trailer() {
            return Ok(());
        }
        let name = entry.name().trim_matches('/');
        if Path::new(name).components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            return Err(io::Error::other(format!("{name:?} is no place in a folder")));
        }
        let (path, mode) = (root.join(name), entry.mode());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        match mode >> 12 {
            0o04 => fs::create_dir_all(&path)?,
            0o10 => {
                let mut file = File::create(&path)?;
                io::copy(&mut reader, &mut file)?;
                file.set_permissions(PermissionsExt::from_mode(mode & 0o755 | 0o600))?;
                file.flush()?;
            }
            0o12 => {
                let mut target = String::new();
                reader.read_to_string(&mut target)?;
                match target.strip_prefix('/') {
                    Some(absolute) => symlink(root.join(absolute), &path)?,
                    None => symlink(&target, &path)?,
                }
            }
            _ => {}
        }
        archive = reader.finish()?;
    }
}

/// Text whose words come again as those of a language do.
fn text() -> String {
    let mut state = 1u32;
    let mut below = move |bound: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (u64::from(state) * u64::from(bound) >> 32) as u32
    };
    let mut text = String::new();
    for line in 0..LINES {
        for _ in 0..3 + below(9) {
            let rare = below(60);
            text.push_str(&format!("{:x} ", below(1 + rare * rare * rare)));
        }
        text.push_str(&format!("({line})\n"));
    }
    text
}

/// A C file with functions of every usual kind.
fn large_c() -> String {
    let mut text = "struct node { struct node *next; long value; char name[24]; };\n\
                    static long table[256];\n"
        .to_owned();
    for n in 0..FUNCTIONS {
        text.push_str(&format!(
            "static long mix{n}(long a, unsigned b) {{\n\
             \x20   switch (b % {cases}) {{\n\
             \x20   case 0: return a * {odd} + b;\n\
             \x20   case 1: return (a >> 3) ^ table[(b + {n}) & 255];\n\
             \x20   case 2: return a < 0 ? -a : a / {odd};\n\
             \x20   default: return a - table[a & 255];\n    }}\n}}\n\
             long walk{n}(struct node *list, long *out, int count) {{\n\
             \x20   long sum = {n};\n\
             \x20   for (struct node *at = list; at; at = at->next) {{\n\
             \x20       for (int i = 0; i < count; i++) {{\n\
             \x20           out[i] += mix{n}(at->value + i, (unsigned)sum);\n\
             \x20           if (out[i] > {odd}000) out[i] %= {odd};\n        }}\n\
             \x20       for (int i = 0; i < 24 && at->name[i]; i++) sum = sum * 31 + at->name[i];\n\
             \x20       table[sum & 255] += sum;\n    }}\n\
             \x20   double scaled = sum * 0.{odd};\n\
             \x20   return (long)(scaled * scaled) + sum;\n}}\n",
            cases = 4 + n % 3,
            odd = 2 * n + 3,
        ));
    }
    text
}
