//! What the host halves share: running a guest with captured streams, and checks that say what was seen.

use std::ffi::OsString;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use krun::{Command, Console, Kernel, Share, Vm, VmConfig};

/// One behaviour: what the host checks, and what runs in the guest.
pub struct Case {
    /// Its name; also that of its file.
    pub name: &'static str,
    /// The host half.
    pub host: fn(&Env) -> Result<(), Failure>,
    /// The guest half: its exit status.
    pub guest: fn(&[OsString]) -> Result<u8, String>,
}

/// Why a case did not pass.
#[derive(Debug)]
pub enum Failure {
    /// Something is not as it should be.
    Wrong(String),
    /// The case cannot run here, and why.
    Skip(String),
}

impl<E: std::fmt::Display> From<E> for Failure {
    fn from(e: E) -> Self {
        Self::Wrong(e.to_string())
    }
}

/// A guest half for cases that run the root's own programs.
pub fn no_guest(_: &[OsString]) -> Result<u8, String> {
    Err("this case has no guest half".into())
}

/// Fails unless `seen` is `wanted`.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, wanted: T) -> Result<(), Failure> {
    if seen == wanted {
        return Ok(());
    }
    Err(Failure::Wrong(format!("{what}: got {seen:?}, wanted {wanted:?}")))
}

/// Fails unless `text` contains `part`.
pub fn contains(what: &str, text: &str, part: &str) -> Result<(), Failure> {
    if text.contains(part) {
        return Ok(());
    }
    Err(Failure::Wrong(format!("{what}: {part:?} is not in {text:?}")))
}

/// What a run printed and how it ended.
#[derive(Debug)]
pub struct Output {
    /// Exit status.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails unless the status is 0; shows what was printed.
    pub fn success(self) -> Result<Self, Failure> {
        if self.code == 0 {
            return Ok(self);
        }
        Err(Failure::Wrong(format!("status {}; stdout {:?}; stderr {:?}", self.code, self.out(), self.err())))
    }
}

/// What the cases run with.
pub struct Env {
    /// The guest's root directory.
    pub root: PathBuf,
    /// The kernel bundle; `None`: the one that the library finds.
    pub kernel: Option<PathBuf>,
    krun: Option<PathBuf>,
    chroot_vm: Option<PathBuf>,
    own: PathBuf,
}

/// Where the guest finds this program.
const MOUNT: &str = "/mnt";

impl Env {
    /// Checks what it is given.
    pub fn new(
        root: PathBuf,
        kernel: Option<PathBuf>,
        krun: Option<PathBuf>,
        chroot_vm: Option<PathBuf>,
    ) -> Result<Self, String> {
        let own = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
        Ok(Self { root, kernel, krun, chroot_vm, own })
    }

    /// The `krun` command.
    pub fn krun(&self) -> Result<process::Command, Failure> {
        let path = self.krun.as_ref().ok_or_else(|| Failure::Skip("no --krun was given".into()))?;
        let mut command = process::Command::new(path);
        command.args(["run", "--accel", "kvm", "--root"]).arg(&self.root);
        if let Some(kernel) = &self.kernel {
            command.arg("--kernel").arg(kernel);
        }
        Ok(command)
    }

    /// The C example.
    pub fn chroot_vm(&self) -> Result<&Path, Failure> {
        self.chroot_vm.as_deref().ok_or_else(|| Failure::Skip("no --chroot-vm was given".into()))
    }

    /// A guest that runs `program` from the root.
    pub fn program<S: Into<OsString>>(&self, program: &str, args: impl IntoIterator<Item = S>) -> VmConfig {
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        VmConfig {
            memory_mib: 256,
            kernel: Kernel::Bundle(self.kernel.clone()),
            shares: vec![Share::root(&self.root)],
            command: Command::new(program).args(args).env("PATH", path).env("HOME", "/root"),
            ..VmConfig::default()
        }
    }

    /// A guest that runs a shell script.
    pub fn shell(&self, script: &str) -> VmConfig {
        self.program("/bin/sh", ["-c", script])
    }

    /// A guest that runs the guest half of `case`.
    pub fn guest_half<S: Into<OsString>>(&self, case: &str, args: impl IntoIterator<Item = S>) -> VmConfig {
        let dir = self.own.parent().unwrap_or(Path::new("/"));
        let name = self.own.file_name().unwrap_or_default().to_string_lossy();
        let words = ["guest", case].into_iter().map(OsString::from).chain(args.into_iter().map(Into::into));
        let mut config = self.program(&format!("{MOUNT}/{name}"), words);
        config.shares.push(Share { read_only: true, mount: Some(MOUNT.into()), ..Share::new("tests", dir) });
        config
    }
}

/// What arrives on a stream, as it arrives.
#[derive(Default)]
struct Seen {
    bytes: Mutex<(Vec<u8>, bool)>,
    changed: Condvar,
}

/// A stream that is being read.
struct Collected {
    seen: Arc<Seen>,
    reader: JoinHandle<std::io::Result<()>>,
}

impl Collected {
    fn from(mut stream: PipeReader) -> Self {
        let seen = Arc::new(Seen::default());
        let shared = Arc::clone(&seen);
        let reader = thread::spawn(move || {
            let mut chunk = vec![0u8; 64 << 10];
            let result = loop {
                match stream.read(&mut chunk) {
                    Ok(0) => break Ok(()),
                    Ok(n) => shared.add(&chunk[..n]),
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => break Err(e),
                }
            };
            shared.end();
            result
        });
        Self { seen, reader }
    }

    fn finish(self) -> Result<Vec<u8>, Failure> {
        self.reader.join().map_err(|_| Failure::Wrong("a reader panicked".into()))??;
        Ok(std::mem::take(&mut self.seen.lock().0))
    }
}

impl Seen {
    fn lock(&self) -> MutexGuard<'_, (Vec<u8>, bool)> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, bytes: &[u8]) {
        self.lock().0.extend_from_slice(bytes);
        self.changed.notify_all();
    }

    fn end(&self) {
        self.lock().1 = true;
        self.changed.notify_all();
    }

    fn wait_for(&self, part: &str) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            let text = String::from_utf8_lossy(&state.0).into_owned();
            if text.contains(part) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.1 || left.is_zero() {
                return Err(Failure::Wrong(format!("{part:?} did not appear in {text:?}")));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// How long a guest may take to print something.
const PATIENCE: Duration = Duration::from_secs(120);

/// A started VM whose streams are pipes of this process.
pub struct Captured {
    /// The VM.
    pub vm: Vm,
    /// The workload's standard input; dropping it is the end of input.
    pub stdin: Option<PipeWriter>,
    stdout: Collected,
    stderr: Collected,
}

/// Starts a VM with captured streams.
pub fn start(mut config: VmConfig) -> Result<Captured, Failure> {
    let ((stdin, stdin_writer), (out_reader, out), (err_reader, err)) = (pipe()?, pipe()?, pipe()?);
    let standard = Console::Standard {
        input: Some(OwnedFd::from(stdin)),
        output: Some(out.into()),
        error: Some(err.into()),
    };
    config.consoles.insert(0, standard);
    let vm = Vm::start(config)?;
    let (stdout, stderr) = (Collected::from(out_reader), Collected::from(err_reader));
    Ok(Captured { vm, stdin: Some(stdin_writer), stdout, stderr })
}

impl Captured {
    /// Waits until the workload has printed `part` on its standard output.
    pub fn wait_for_output(&self, part: &str) -> Result<(), Failure> {
        self.stdout.seen.wait_for(part)
    }

    /// What the workload has printed on its standard output until now.
    pub fn output_so_far(&self) -> String {
        String::from_utf8_lossy(&self.stdout.seen.lock().0).into_owned()
    }

    /// Ends the input, waits for the end and gives back what was printed.
    pub fn finish(mut self) -> Result<Output, Failure> {
        drop(self.stdin.take());
        let code = self.vm.wait().map(|s| s.code());
        // The devices hold the pipes' writing ends; they go with the machine.
        drop(self.vm);
        let (stdout, stderr) = (self.stdout.finish()?, self.stderr.finish()?);
        let code = code.map_err(|e| {
            let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
            Failure::Wrong(format!("{e}; stdout {out:?}; stderr {err:?}"))
        })?;
        Ok(Output { code, stdout, stderr })
    }
}

/// Runs a VM to its end with no input.
pub fn run(config: VmConfig) -> Result<Output, Failure> {
    start(config)?.finish()
}

/// Runs a VM to its end with `input` on its standard input.
pub fn run_with_input(config: VmConfig, input: Vec<u8>) -> Result<Output, Failure> {
    let mut captured = start(config)?;
    let mut stdin = captured.stdin.take().ok_or_else(|| Failure::Wrong("no standard input".into()))?;
    let feeder = thread::spawn(move || stdin.write_all(&input));
    let output = captured.finish();
    // A guest that ends early closes the pipe; the output tells whether that was right.
    let _ = feeder.join();
    output
}

/// The file of a program of this host, looked for in `KRUN_TEST_PEERS` first.
pub fn find(program: &str) -> Result<PathBuf, Failure> {
    let dirs = |name| std::env::var_os(name).unwrap_or_default();
    let (own, path) = (dirs("KRUN_TEST_PEERS"), dirs("PATH"));
    let mut places = std::env::split_paths(&own).chain(std::env::split_paths(&path)).map(|d| d.join(program));
    places.find(|p| p.is_file()).ok_or_else(|| Failure::Skip(format!("there is no {program} here")))
}

/// A directory that goes away with the value.
pub struct TempDir(PathBuf);

impl TempDir {
    /// Creates one under `/tmp`, which is a tmpfs in the emulated host.
    pub fn new(name: &str) -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("krun-test-{name}-{}", process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A file system mounted on this host, until the value goes.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts `what` on the directory `at`, by the program `mount` with more words.
    pub fn new(words: &[&str], what: &str, at: &Path) -> Result<Self, Failure> {
        match process::Command::new("mount").args(words).arg(what).arg(at).output() {
            Ok(out) if out.status.success() => Ok(Self(at.to_owned())),
            Ok(out) => {
                let why = String::from_utf8_lossy(&out.stderr).into_owned();
                Err(Failure::Skip(format!("{what} cannot be mounted here: {}", why.trim())))
            }
            Err(e) => Err(Failure::Skip(format!("no mount on this host: {e}"))),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Bytes that do not repeat, the same at every call: a xorshift sequence.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Descriptors and threads of this process.
pub fn own_resources() -> Result<(usize, usize), Failure> {
    let count = |dir: &str| std::fs::read_dir(dir).map(Iterator::count);
    Ok((count("/proc/self/fd")?, count("/proc/self/task")?))
}
