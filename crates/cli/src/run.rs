//! `krun run` on this host's own KVM.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use krun::{Command, Console, Input, Kernel, KernelFormat, Share, Vm, VmConfig};

use crate::args::Run;
use crate::{disks, nets, signals};

/// Search path of a program that was given none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs it and gives back the exit status.
pub fn run(args: &Run, verbose: bool) -> Result<i32, String> {
    check(args)?;
    let mut config = config(args, verbose)?;
    // The programs that were started for it, which end with the machine.
    let _peers = nets::add(args, &mut config.nets, verbose)?;
    if let Err(e) = krun::raise_open_file_limit() {
        tracing::warn!("the limit of open files stays: {e}");
    }
    let signals = signals::Signals::catch(signals::Early::Keep)
        .map_err(|e| format!("cannot prepare for signals: {e}"))?;
    let vm = Arc::new(Vm::start(config).map_err(|e| e.to_string())?);
    signals.forward_to(&vm);
    let status = vm.wait().map_err(|e| e.to_string())?;
    if verbose {
        let exits: Vec<_> = vm.exits().iter().map(|(reason, n)| format!("{reason} {n}")).collect();
        eprintln!("krun: exits to user space: {}", exits.join(", "));
    }
    Ok(status.code())
}

fn config(args: &Run, verbose: bool) -> Result<VmConfig, String> {
    let vcpus =
        u8::try_from(args.cpus).map_err(|_| format!("--cpus {}: a VM can have 1 to 16", args.cpus))?;
    let memory_mib = u32::try_from(args.memory)
        .map_err(|_| format!("--memory {} MiB is more than a machine can have", args.memory))?;
    let kernel_log = match &args.console_log {
        None => None,
        Some(path) => {
            let file = File::create(path).map_err(|e| format!("--console-log {}: {e}", path.display()))?;
            Some(file.into())
        }
    };
    let (disks, root_disk) = disks::disks(args);
    Ok(VmConfig {
        vcpus,
        memory_mib,
        kernel: kernel(args)?,
        kernel_args: args.kernel_args.iter().cloned().collect(),
        shares: shares(args)?,
        disks,
        root_disk,
        command: command(args),
        consoles: vec![
            Console::inherit().map_err(|e| format!("cannot duplicate the standard streams: {e}"))?,
        ],
        kernel_log,
        nested: args.nested,
        oem_strings: args.oem_strings.clone(),
        huge_pages: args.huge_pages,
        balloon: !args.no_balloon,
        inputs: args.inputs.iter().map(|path| input(path)).collect::<Result<_, _>>()?,
        vsock: (!args.vsock.is_empty()).then(|| krun::Vsock { ports: args.vsock.clone() }),
        // One source of randomness is enough.
        rng: args.vhost_user.iter().all(|d| d.kind != krun::DeviceKind::RNG),
        vhost_user: args.vhost_user.clone(),
        verbose,
        ..VmConfig::default()
    })
}

/// An input device, with its lights if it may be written to.
fn input(path: &Path) -> Result<Input, String> {
    let fail = |e: &dyn std::fmt::Display| format!("--input {}: {e}", path.display());
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .or_else(|_| File::open(path))
        .map_err(|e| fail(&e))?;
    Input::evdev(file.into()).map_err(|e| fail(&e))
}

fn command(args: &Run) -> Command {
    let mut words = args.command.iter();
    let mut env: Vec<OsString> = Vec::new();
    for entry in &args.env {
        if entry.as_bytes().contains(&b'=') {
            env.push(entry.clone());
        } else if let Some(value) = std::env::var_os(entry) {
            let mut both = entry.clone();
            both.push("=");
            both.push(value);
            env.push(both);
        }
    }
    let mut default = |key: &str, value: &OsStr| {
        let prefix = format!("{key}=");
        if !env.iter().any(|e| e.as_bytes().starts_with(prefix.as_bytes())) {
            let mut entry = OsString::from(prefix);
            entry.push(value);
            env.push(entry);
        }
    };
    default("PATH", OsStr::new(DEFAULT_PATH));
    if let Some(term) = std::env::var_os("TERM") {
        default("TERM", &term);
    }
    Command {
        program: words.next().cloned().unwrap_or_default(),
        args: words.cloned().collect(),
        env,
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        hostname: args.hostname.clone(),
        limits: args.limits.clone(),
    }
}

/// Checks what can be checked of the words alone and of this host's directories.
pub fn check(args: &Run) -> Result<(), String> {
    args.root.iter().try_for_each(|root| check_directory("--root", root))?;
    disks::check(args)?;
    args.volumes.iter().try_for_each(|v| check_directory("--volume", &v.host))?;
    if args.tty && !(std::io::stdin().is_terminal() && std::io::stdout().is_terminal()) {
        return Err("--tty: standard input and output are no terminals; leave the option out".into());
    }
    if args.command.first().is_some_and(|word| word.is_empty()) {
        return Err("the command is an empty word; a variable that is not set?".into());
    }
    kernel(args).map(|_| ())
}

fn shares(args: &Run) -> Result<Vec<Share>, String> {
    let dax = args.root_dax.map(krun::Dax::new);
    let root = args.root.as_ref().map(|root| Share { read_only: args.read_only, dax, ..Share::root(root) });
    let mut shares: Vec<_> = root.into_iter().collect();
    for (n, volume) in args.volumes.iter().enumerate() {
        shares.push(Share {
            read_only: volume.read_only,
            cache: volume.cache,
            locks: volume.locks,
            dax: volume.dax,
            mount: Some(volume.guest.clone()),
            ..Share::new(format!("volume{n}"), &volume.host)
        });
    }
    Ok(shares)
}

fn check_directory(option: &str, path: &Path) -> Result<(), String> {
    match std::fs::read_dir(path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(format!("{option} {}: there is no such directory", path.display()))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => {
            Err(format!("{option} {}: it is a file; name a directory", path.display()))
        }
        Err(e) => Err(format!("{option} {}: {e}", path.display())),
    }
}

/// A bundle is a shared library; everything else is an image whose format its first bytes tell.
fn kernel(args: &Run) -> Result<Kernel, String> {
    let Some(path) = &args.kernel else { return Ok(Kernel::Bundle(None)) };
    let fail = |e: &dyn std::fmt::Display| format!("--kernel {}: {e}", path.display());
    let mut head = [0u8; 512];
    let len =
        File::open(path).and_then(|mut f| std::io::Read::read(&mut f, &mut head)).map_err(|e| fail(&e))?;
    let format = match &head[..len] {
        [0x7f, b'E', b'L', b'F', rest @ ..] => {
            // e_type, at offset 16: 3 is a shared object.
            if rest.get(12) == Some(&3) && args.initramfs.is_none() {
                return Ok(Kernel::Bundle(Some(path.clone())));
            }
            KernelFormat::Elf
        }
        [0x1f, 0x8b, ..] => KernelFormat::ImageGz,
        [b'B', b'Z', b'h', ..] => KernelFormat::ImageBz2,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => KernelFormat::ImageZstd,
        [] => return Err(fail(&"the file is empty")),
        _ => KernelFormat::Raw,
    };
    Ok(Kernel::File { path: path.clone(), format, initramfs: args.initramfs.clone(), cmdline: None })
}

/// Directories that the emulated host needs besides what it shows of this machine: those that the run writes to, and
/// those below directories that are its own there.
pub fn exported_paths(args: &Run) -> Vec<PathBuf> {
    let mut paths = writable_paths(args);
    let directories = args.root.iter().chain(args.volumes.iter().map(|v| &v.host));
    let files = [&args.kernel, &args.initramfs].into_iter().flatten();
    let files = files.chain(args.root_disk.iter().chain(&args.disks).map(|arg| &arg.disk.path));
    let real = |path: &PathBuf| path.canonicalize().ok();
    let read =
        directories.filter_map(real).chain(files.filter_map(real).filter_map(|f| Some(f.parent()?.into())));
    let is_hidden = |path: &PathBuf| ["/run", "/dev", "/sys"].iter().any(|own| path.starts_with(own));
    paths.extend(read.filter(is_hidden));
    paths
}

/// Directories that the run writes to.
fn writable_paths(args: &Run) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::new();
    if !args.read_only {
        paths.extend(args.root.clone());
    }
    paths.extend(args.volumes.iter().filter(|v| !v.read_only).map(|v| v.host.clone()));
    paths.extend(disks::writable_paths(args));
    if let Some(dir) =
        args.console_log.as_ref().map(|log| log.parent().map(Path::to_owned).unwrap_or_default())
    {
        paths.push(if dir.as_os_str().is_empty() { PathBuf::from(".") } else { dir });
    }
    paths
}
