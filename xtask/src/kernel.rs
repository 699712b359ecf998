//! `cargo xtask kernel`: the guest's kernel with its bundle, and the emulated host's kernel.
//!
//! Results live outside of the tree, in a folder named after everything that goes into them, so that a
//! change of a fragment builds anew and nothing else does. `guest` and `host` beside those folders are
//! links to the latest of each.

mod build;
mod bundle;
mod config;
mod elf;
mod source;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{cache_dir, packages};
use source::Source;

/// Raised when the same inputs make other outputs.
const BUILDER_VERSION: u32 = 2;

/// Processor that a kernel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// `x86_64`.
    X86_64,
    /// `aarch64`, which the kernel's build calls arm64.
    Aarch64,
}

impl Arch {
    const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    const fn kernel_name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Prefix of the compiler's and linker's names, empty for the machine's own.
    fn tools(self) -> &'static str {
        if std::env::consts::ARCH == self.name() {
            return "";
        }
        match self {
            Self::X86_64 => "x86_64-linux-gnu-",
            Self::Aarch64 => "aarch64-linux-gnu-",
        }
    }

    fn parse(name: &str) -> Result<Self, String> {
        match name {
            "x86_64" => Ok(Self::X86_64),
            "aarch64" | "arm64" => Ok(Self::Aarch64),
            _ => Err(format!("no architecture {name}: x86_64 or aarch64")),
        }
    }
}

/// What a kernel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It runs in microVMs.
    Guest,
    /// It runs in QEMU and has KVM.
    Host,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Host => "host",
        }
    }
}

/// The guest's kernel, built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// The kernel as ELF file without symbols.
    pub vmlinux: PathBuf,
    /// `libkrunfw.so.5` with the same kernel.
    pub bundle: PathBuf,
}

impl Guest {
    fn in_dir(dir: &Path) -> Self {
        Self { vmlinux: dir.join("vmlinux"), bundle: dir.join(bundle::SONAME) }
    }
}

/// The guest's kernel for this machine from the default source, built if it is not in the cache.
///
/// # Errors
/// What is missing, or why the build failed.
pub fn ensure_guest() -> Result<Guest, String> {
    ensure(&Request::of(Role::Guest)).map(|dir| Guest::in_dir(&dir))
}

/// The emulated host's kernel, an ELF file, built if it is not in the cache.
///
/// # Errors
/// What is missing, or why the build failed.
pub fn ensure_host() -> Result<PathBuf, String> {
    ensure(&Request::of(Role::Host)).map(|dir| dir.join("vmlinux-host"))
}

/// The guest's kernel if it is in the cache as [`ensure_guest`] would build it.
///
/// # Errors
/// The cache or the fragments cannot be read.
pub fn cached_guest() -> Result<Option<Guest>, String> {
    // Without a source or a compiler nothing can have been built from them.
    let request = Request::of(Role::Guest);
    let Ok(source) = Source::find(None) else { return Ok(None) };
    let Ok(plan) = Plan::new(&request, &source) else { return Ok(None) };
    Ok(plan.is_built().then(|| Guest::in_dir(&plan.dir)))
}

/// What to build, and from what.
#[derive(Debug, Clone)]
struct Request {
    role: Role,
    arch: Arch,
    source: Option<PathBuf>,
    keep: bool,
}

impl Request {
    fn of(role: Role) -> Self {
        let arch = if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 };
        Self { role, arch, source: None, keep: false }
    }
}

/// Runs the subcommand with its arguments.
///
/// # Errors
/// A wrong argument, or what [`ensure_guest`] says.
pub fn run(args: &[String]) -> Result<(), String> {
    let mut request = Request::of(Role::Guest);
    let (mut roles, mut print) = (vec![Role::Guest, Role::Host], false);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value\n{USAGE}"));
        match arg.as_str() {
            "--source" => request.source = Some(PathBuf::from(value()?)),
            "--arch" => request.arch = Arch::parse(value()?)?,
            "--role" => {
                roles = match value()?.as_str() {
                    "guest" => vec![Role::Guest],
                    "host" => vec![Role::Host],
                    "all" => vec![Role::Guest, Role::Host],
                    other => return Err(format!("no role {other}: guest, host or all")),
                }
            }
            "--print" => print = true,
            "--keep" => request.keep = true,
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => return Err(format!("unknown argument {other}\n{USAGE}")),
        }
    }
    if request.arch == Arch::Aarch64 {
        // The emulated host is x86_64's only.
        roles.retain(|r| *r == Role::Guest);
    }
    for role in roles {
        request.role = role;
        let dir = if print {
            packages::ensure("a kernel build", build::packages(request.arch))?;
            Plan::new(&request, &Source::find(request.source.as_deref())?)?.dir
        } else {
            ensure(&request)?
        };
        for name in outputs(role) {
            println!("{}", dir.join(name).display());
        }
    }
    Ok(())
}

const USAGE: &str = "usage: cargo xtask kernel [--source DIR|TARBALL] [--arch x86_64|aarch64] \
                     [--role guest|host|all] [--print] [--keep]\n  \
                     --source  a Linux tree of 6.12 or later, or its tarball (default: Debian's linux-source-6.12)\n  \
                     --print   say where the results are or would be, and build nothing\n  \
                     --keep    leave the build tree for a look";

const fn outputs(role: Role) -> &'static [&'static str] {
    match role {
        Role::Guest => &["vmlinux", bundle::SONAME],
        Role::Host => &["vmlinux-host"],
    }
}

/// Everything that decides about a build, and where its results belong.
struct Plan {
    /// Folder of the results, named by the hash of all inputs.
    dir: PathBuf,
    role: Role,
    arch: Arch,
    options: std::collections::BTreeMap<String, String>,
    patches: Vec<PathBuf>,
}

impl Plan {
    fn new(request: &Request, source: &Source) -> Result<Self, String> {
        let kernel = repository().join("kernel");
        let fragments = match request.role {
            Role::Guest => vec!["common.config".to_owned(), format!("{}.config", request.arch.name())],
            Role::Host => vec!["common.config".into(), "x86_64.config".into(), "host.config".into()],
        };
        let mut texts = Vec::new();
        for name in fragments {
            let path = kernel.join("config").join(&name);
            texts.push((name, fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?));
        }
        let options = config::merge(texts.iter().map(|(n, t)| (n.as_str(), t.as_str())))?;
        let patches = match request.role {
            Role::Guest => patches(&kernel.join("patches"))?,
            // Its boot is saved once and resumed: a change of a patch need not build it anew.
            Role::Host => Vec::new(),
        };
        let mut inputs = vec![
            ("builder", BUILDER_VERSION.to_string()),
            ("role", request.role.name().to_owned()),
            ("arch", request.arch.name().to_owned()),
            ("source", source.identity()?),
            ("compiler", compiler_version(request.arch)?),
            ("options", config::to_text(&options)),
        ];
        for patch in &patches {
            let text = fs::read(patch).map_err(|e| format!("{}: {e}", patch.display()))?;
            inputs.push(("patch", changes(&String::from_utf8_lossy(&text)).to_owned()));
        }
        let dir = home()?.join(hash(&inputs)?);
        Ok(Self { dir, role: request.role, arch: request.arch, options, patches })
    }

    fn is_built(&self) -> bool {
        outputs(self.role).iter().all(|name| self.dir.join(name).is_file())
    }
}

/// The folder with what `request` asks for, built if it is not there.
fn ensure(request: &Request) -> Result<PathBuf, String> {
    packages::ensure("a kernel build", build::packages(request.arch))?;
    if request.source.is_none() && Source::find(None).is_err() {
        packages::ensure("a kernel build", &[source::DEBIAN_PACKAGE])?;
    }
    let source = Source::find(request.source.as_deref())?;
    let plan = Plan::new(request, &source)?;
    if !plan.is_built() {
        let home = home()?;
        fs::create_dir_all(&home).map_err(|e| format!("cannot create {}: {e}", home.display()))?;
        let _lock = lock(&home.join("lock"))?;
        // Another run may have built it meanwhile.
        if !plan.is_built() {
            build::run(&plan, &source, &home, request.keep)?;
        }
    }
    link_latest(&plan)?;
    Ok(plan.dir)
}

/// Makes `guest` or `host` in the cache point to the results of `plan`.
fn link_latest(plan: &Plan) -> Result<(), String> {
    let home = home()?;
    let name = match plan.arch {
        Arch::X86_64 => plan.role.name().to_owned(),
        Arch::Aarch64 => format!("{}-aarch64", plan.role.name()),
    };
    let (link, target) = (home.join(&name), plan.dir.file_name().unwrap_or_default());
    if fs::read_link(&link).is_ok_and(|t| t == target) {
        return Ok(());
    }
    let new = home.join(format!("{name}.new.{}", std::process::id()));
    std::os::unix::fs::symlink(target, &new)
        .and_then(|()| fs::rename(&new, &link))
        .map_err(|e| format!("{}: {e}", link.display()))
}

fn home() -> Result<PathBuf, String> {
    Ok(cache_dir()?.join("kernel"))
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// Our patches in the order of their names.
fn patches(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let list = fs::read_dir(dir).map_err(|e| format!("cannot read {}: {e}", dir.display()))?;
    let mut found: Vec<PathBuf> =
        list.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "patch")).collect();
    found.sort();
    Ok(found)
}

/// A patch without the explanation at its top.
fn changes(patch: &str) -> &str {
    patch.find("\n--- ").and_then(|at| patch.get(at + 1..)).unwrap_or(patch)
}

fn compiler_version(arch: Arch) -> Result<String, String> {
    let gcc = format!("{}gcc", arch.tools());
    let out = Command::new(&gcc).arg("--version").output().map_err(|e| format!("cannot run {gcc}: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.lines().next().map(str::to_owned).ok_or_else(|| format!("{gcc} --version says nothing"))
}

/// Sixteen hexadecimal digits of the SHA-256 over named inputs, each with its length so that none runs into the next.
fn hash(inputs: &[(&str, String)]) -> Result<String, String> {
    let mut text = String::new();
    for (name, value) in inputs {
        text.push_str(&format!("{name} {}\n{value}\n", value.len()));
    }
    sha256(text.as_bytes()).map(|mut digest| {
        digest.truncate(16);
        digest
    })
}

/// SHA-256 in hexadecimal, by coreutils.
fn sha256(bytes: &[u8]) -> Result<String, String> {
    let fail = |e: std::io::Error| format!("cannot run sha256sum: {e}");
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(fail)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(bytes).map_err(fail)?;
    }
    digest(&child.wait_with_output().map_err(fail)?.stdout)
}

fn digest(output: &[u8]) -> Result<String, String> {
    let text = String::from_utf8_lossy(output);
    match text.split(' ').next() {
        Some(hex) if hex.len() == 64 => Ok(hex.to_owned()),
        _ => Err("sha256sum gave no digest".into()),
    }
}

/// Waits until no other build runs; the lock ends with the returned file.
fn lock(path: &Path) -> Result<File, String> {
    use rustix::fs::{FlockOperation, flock};
    let fail = |e: std::io::Error| format!("cannot lock {}: {e}", path.display());
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(fail)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("another kernel build is running; waiting for it");
        flock(&file, FlockOperation::LockExclusive).map_err(|e| fail(e.into()))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_stable_and_every_input_counts() {
        let of = |inputs: &[(&str, &str)]| {
            hash(&inputs.iter().map(|(n, v)| (*n, (*v).to_owned())).collect::<Vec<_>>()).unwrap()
        };
        let base = of(&[("source", "6.12"), ("options", "CONFIG_A=y\n")]);
        assert_eq!(base, "355d25a8f56ed7b1");
        assert_eq!(base, of(&[("source", "6.12"), ("options", "CONFIG_A=y\n")]));
        assert_ne!(base, of(&[("source", "6.13"), ("options", "CONFIG_A=y\n")]));
        assert_ne!(base, of(&[("source", "6.12"), ("options", "CONFIG_A=n\n")]));
        assert_ne!(of(&[("a", "xy"), ("b", "z")]), of(&[("a", "x"), ("b", "yz")]));
    }

    #[test]
    fn the_fragments_of_the_repository_are_well_formed() {
        for (role, files) in [
            (Role::Guest, ["common", "x86_64"].as_slice()),
            (Role::Guest, &["common", "aarch64"]),
            (Role::Host, &["common", "x86_64", "host"]),
        ] {
            let texts: Vec<(String, String)> = files
                .iter()
                .map(|f| {
                    let path = repository().join(format!("kernel/config/{f}.config"));
                    ((*f).to_owned(), fs::read_to_string(path).unwrap())
                })
                .collect();
            let options = config::merge(texts.iter().map(|(n, t)| (n.as_str(), t.as_str()))).unwrap();
            let kvm = options.get("CONFIG_KVM").map(String::as_str);
            assert_eq!(kvm, (role == Role::Host).then_some("y"));
        }
    }

    #[test]
    fn only_the_changes_of_a_patch_count() {
        let changes_of =
            |head: &str| changes(&format!("{head}---\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-1\n+2\n")).to_owned();
        assert_eq!(changes_of("Subject: one\n"), changes_of("Subject: two\n\nWhy.\n"));
        assert!(changes_of("").starts_with("--- a/x\n"));
        assert_eq!(changes("--- a/x\n"), "--- a/x\n");
    }

    #[test]
    fn patches_say_their_licence_and_gain() {
        for patch in patches(&repository().join("kernel/patches")).unwrap() {
            let text = fs::read_to_string(&patch).unwrap();
            assert!(text.contains("SPDX-License-Identifier: GPL-2.0-only"), "{}", patch.display());
            assert!(text.contains("Measured:"), "{}", patch.display());
        }
    }

    #[test]
    fn a_second_lock_waits_for_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = lock(&path).unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        let second = path.clone();
        let thread = std::thread::spawn(move || {
            let file = lock(&second).unwrap();
            send.send(()).unwrap();
            drop(file);
        });
        assert!(receive.recv_timeout(std::time::Duration::from_millis(200)).is_err());
        drop(first);
        receive.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn wrong_arguments_are_told() {
        let told =
            |args: &[&str]| run(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>()).unwrap_err();
        assert!(told(&["--role", "router"]).contains("no role router"));
        assert!(told(&["--arch", "vax"]).contains("no architecture vax"));
        assert!(told(&["--source"]).contains("needs a value"));
        assert!(told(&["--fast"]).contains("unknown argument --fast"));
    }
}
