//! The command line.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs programs in microVMs.
#[derive(Debug, Parser)]
#[command(name = "krun", version, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    /// Show more: what is done, the guest kernel's messages, timings. Twice: everything.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the command can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program from a root directory in a microVM.
    Run(Box<Run>),
    /// Check whether this host can run microVMs, and say what to do where it cannot.
    Doctor,
    /// Run a command of this host, as it is, in the emulated host: for tests, and to look around there.
    Lab(Lab),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print a manual page (roff): that of krun, or of one of its commands.
    Man {
        /// The command.
        command: Option<String>,
    },
}

/// Where the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM if it works, else the emulated host.
    Auto,
    /// KVM, or an error.
    Kvm,
    /// A host emulated by QEMU, with KVM of its own.
    Emulated,
}

/// `krun lab`.
#[derive(Debug, Args)]
pub struct Lab {
    /// A directory of this host that the command may change; everything else it can only read.
    #[arg(short, long = "writable", value_name = "DIR")]
    pub writable: Vec<PathBuf>,

    /// Only make sure that an emulated host can be started at once.
    #[arg(long)]
    pub prepare: bool,

    /// Run it bit-exact: alone in a machine that counts instructions, 16 ns each, and takes all time from
    /// that. There is nothing there but the program, with its libraries, and what --add names.
    #[arg(long, conflicts_with_all = ["writable", "prepare"])]
    pub exact: bool,

    /// A file of this host for --exact, at the same path there or at another; of a program, its libraries too.
    #[arg(long, value_name = "FILE[:PATH]", requires = "exact")]
    pub add: Vec<String>,

    /// The command; without one, a shell.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `krun run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Directory on this host that becomes the guest's root.
    #[arg(short, long, value_name = "DIR", required_unless_present = "root_disk")]
    pub root: Option<PathBuf>,

    /// The guest cannot change the root.
    #[arg(long)]
    pub read_only: bool,

    /// A window of this size into which the guest maps large files of the root, as with `dax=` of a volume.
    #[arg(long, value_name = "SIZE", requires = "root", value_parser = size)]
    pub root_dax: Option<u64>,

    /// Share a host directory at a path of the guest, `:ro` if the guest may not change it. `:cache=always` if
    /// nobody else changes it meanwhile, `:cache=writeback` if nobody else looks at it either, `:cache=never` if each
    /// side must see the other's changes at once, not within a second; `:locks` if locks of guest and host are to
    /// exclude each other. `:dax=SIZE` makes a window of that size (MiB, or with a suffix; 16G at most) into which the
    /// guest maps files of 1 MiB or more, or those of `:dax-from=SIZE` or more: they are in memory once, not once more in
    /// each guest. Files on overlayfs are only with `:ro:cache=always`.
    #[arg(long = "volume", value_name = "HOST:GUEST[:ro][:cache=HOW][:locks][:dax=SIZE[:dax-from=SIZE]]", value_parser = os_parser(volume))]
    pub volumes: Vec<Volume>,

    /// Disk image that becomes the guest's root, with options as for --disk. Its file system is found by trying;
    /// without a partition table, /dev/vda is the root, or the device that part=N adds.
    #[arg(long, value_name = "FILE[:OPTION]...", conflicts_with_all = ["root", "read_only"],
        value_parser = os_parser(crate::disks::parse_root))]
    pub root_disk: Option<crate::disks::DiskArg>,

    /// Disk image that the guest sees as /dev/vda, vdb and so on, after the root disk. Options: ro,
    /// format=raw|qcow2|vmdk (never guessed; raw), sync=none|relaxed|full (full), direct, backing (a qcow2 image
    /// may name other files), id=NAME, queues=N.
    #[arg(long = "disk", value_name = "FILE[:OPTION]...", value_parser = os_parser(crate::disks::parse_disk))]
    pub disks: Vec<crate::disks::DiskArg>,

    /// Virtual CPUs.
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,

    /// Memory in MiB, or with a suffix: 512M, 2G.
    #[arg(short, long, value_name = "SIZE", default_value = "512", value_parser = memory)]
    pub memory: u64,

    /// Take the memory from huge pages that were set aside (sysctl vm.nr_hugepages).
    #[arg(long)]
    pub huge_pages: bool,

    /// An environment variable; without a value it is taken from here.
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = os_parser(variable))]
    pub env: Vec<OsString>,

    /// Working directory in the guest.
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,

    /// User, and group, by name or number in the guest.
    #[arg(short, long, value_name = "USER[:GROUP]", value_parser = os_parser(user))]
    pub user: Option<(OsString, Option<OsString>)>,

    /// Host name of the guest.
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<OsString>,

    /// A resource limit, such as nofile=1024:4096.
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    pub limits: Vec<krun::Limit>,

    /// Insist on a terminal. The program gets one whenever standard input and output are terminals; with
    /// this option it is an error if they are not.
    #[arg(short, long)]
    pub tty: bool,

    /// Does nothing: standard input always reaches the program. Accepted so that -it works as elsewhere.
    #[arg(short, long)]
    pub interactive: bool,

    /// Kernel: a bundle (libkrunfw.so.5) or an image (vmlinux, bzImage, gz, bz2, zstd).
    #[arg(short, long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk for a kernel image.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initramfs: Option<PathBuf>,

    /// Words added to the kernel's command line.
    #[arg(long, value_name = "WORDS")]
    pub kernel_args: Option<String>,

    /// Write the kernel's messages to a file.
    #[arg(long, value_name = "FILE")]
    pub console_log: Option<PathBuf>,

    /// Let the guest run virtual machines itself.
    #[arg(long)]
    pub nested: bool,

    /// Give an input device of this host to the guest as well.
    #[arg(long = "input", value_name = "/dev/input/eventN")]
    pub inputs: Vec<PathBuf>,

    /// A network interface, eth0 and so on: passt (one is started, and ends with the guest), unix-stream:PATH (passt and
    /// the like), unix-dgram:PATH (gvproxy with vfkit, vmnet-helper), tap:NAME. Options after a comma: mac=ADDRESS,
    /// dhcp=off, vfkit; for passt tcp=PORTS and udp=PORTS, as its -t and -u take them. With -v it is heard. A
    /// fault of older versions (2023-03, 2025-05): a connection that the guest closes for sending before it has the whole
    /// answer gets parts of it again, or stalls. What comes to the guest is slow where the host's net.core.wmem_max is
    /// small (208 KiB by default): passt drops what does not fit.
    #[arg(long = "net", value_name = "PEER[,OPTION]...", value_parser = crate::nets::parse)]
    pub nets: Vec<crate::nets::NetArg>,

    /// Join a vsock port to a unix socket of this host: a connection of the guest to the host's port (CID 2) goes to
    /// the socket at PATH. With :listen a socket is created at PATH, and a connection to it goes to the guest's port;
    /// with :listen=seqpacket one that keeps messages apart. For its own connections the guest chooses that.
    #[arg(long, value_name = "PORT:PATH[:listen[=seqpacket]]", value_parser = os_parser(vsock))]
    pub vsock: Vec<krun::VsockPort>,

    /// A device whose other half is another process, which listens on SOCKET (vhost-user): rng, console, input, vsock,
    /// snd, can, rtc, block, fs and others, or a number of the virtio standard. Options after a comma: queues=N (what
    /// the process says), size=N (entries of each queue), for fs tag=NAME (where the process says none).
    #[arg(long = "vhost-user", value_name = "TYPE:SOCKET[,OPTION]...", value_parser = os_parser(crate::vhost::parse))]
    pub vhost_user: Vec<krun::VhostUser>,

    /// Keep memory that the guest has freed; without this option it goes back to the host after some seconds.
    #[arg(long)]
    pub no_balloon: bool,

    /// A string for the guest's SMBIOS tables (type 11), where cloud images and systemd look for settings.
    #[arg(long = "oem-string", value_name = "TEXT")]
    pub oem_strings: Vec<String>,

    /// Where the guest runs.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Accel::Auto)]
    pub accel: Accel,

    /// The program and its arguments; without one, what the root's /.krun_config.json says, else /bin/sh.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// A host directory in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// On this host.
    pub host: PathBuf,
    /// In the guest, absolute.
    pub guest: PathBuf,
    /// The guest cannot change it.
    pub read_only: bool,
    /// What the guest keeps of it.
    pub cache: krun::Cache,
    /// Locks of both sides exclude each other.
    pub locks: bool,
    /// A window for mapped files.
    pub dax: Option<krun::Dax>,
}

/// A value parser from a function on bytes.
fn os_parser<T: Clone + Send + Sync + 'static>(parse: fn(&OsStr) -> Result<T, String>) -> ValueParser {
    ValueParser::new(OsStringValueParser::new().try_map(move |s| parse(&s)))
}

fn volume(text: &OsStr) -> Result<Volume, String> {
    let mut bytes = text.as_bytes();
    let (mut read_only, mut cache, mut locks) = (false, krun::Cache::Auto, false);
    let (mut window, mut from) = (None, None);
    let (host, guest) = loop {
        let split = bytes.iter().rposition(|b| *b == b':');
        let at = split.ok_or("write HOST:GUEST, and options after that")?;
        match &bytes[at + 1..] {
            b"ro" => read_only = true,
            b"rw" => {}
            b"locks" => locks = true,
            b"cache=never" => cache = krun::Cache::Never,
            b"cache=auto" => {}
            b"cache=always" => cache = krun::Cache::Always,
            b"cache=writeback" => cache = krun::Cache::WriteBack,
            word if word.starts_with(b"cache=") => {
                return Err("cache= is never, auto, always or writeback".into());
            }
            word if word.starts_with(b"dax=") => window = Some(size_of(&word[4..])?),
            word if word.starts_with(b"dax-from=") => from = Some(size_of(&word[9..])?),
            guest => break (&bytes[..at], guest),
        }
        bytes = &bytes[..at];
    };
    let path = |b: &[u8]| PathBuf::from(OsString::from_vec(b.to_vec()));
    if host.is_empty() {
        return Err("the host directory before ':' is empty".into());
    }
    if !guest.starts_with(b"/") {
        return Err("the path in the guest must be absolute".into());
    }
    let dax = match (window, from) {
        (None, Some(_)) => return Err("dax-from= is for a window: write dax=SIZE as well".into()),
        (window, from) => window.map(|window| krun::Dax { window, from: from.unwrap_or(krun::Dax::FROM) }),
    };
    Ok(Volume { host: path(host), guest: path(guest), read_only, cache, locks, dax })
}

/// A size in MiB, or with a suffix, in bytes.
fn size(text: &str) -> Result<u64, String> {
    memory(text)?.checked_mul(1 << 20).ok_or_else(|| "more than a number can hold".to_owned())
}

/// The same of an option.
fn size_of(text: &[u8]) -> Result<u64, String> {
    size(std::str::from_utf8(text).unwrap_or_default()).map_err(|e| format!("dax: {e}"))
}

fn vsock(text: &OsStr) -> Result<krun::VsockPort, String> {
    let bytes = text.as_bytes();
    let (bytes, socket) = match bytes.strip_suffix(b"=seqpacket") {
        Some(rest) if rest.ends_with(b":listen") => (rest, krun::VsockType::SeqPacket),
        _ => (bytes, krun::VsockType::Stream),
    };
    let (bytes, direction) = match bytes.strip_suffix(b":listen") {
        Some(rest) => (rest, krun::VsockDirection::FromHost),
        None => (bytes, krun::VsockDirection::FromGuest),
    };
    let at = bytes.iter().position(|b| *b == b':').ok_or("write PORT:PATH[:listen[=seqpacket]]")?;
    let (port, path) = (&bytes[..at], &bytes[at + 1..]);
    let port = std::str::from_utf8(port).ok().and_then(|p| p.parse().ok());
    let port = port.ok_or("the port before ':' is a number from 0 to 4294967294")?;
    let spec = krun::VsockPort { port, path: PathBuf::from(OsStr::from_bytes(path)), direction, socket };
    spec.validate().map_err(|e| e.to_string())?;
    Ok(spec)
}

/// Memory in MiB.
fn memory(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let lower = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
    let (digits, scale) = match lower.as_bytes().last() {
        Some(b'm') => (&lower[..lower.len() - 1], 1),
        Some(b'g') => (&lower[..lower.len() - 1], 1024),
        Some(b't') => (&lower[..lower.len() - 1], 1024 * 1024),
        _ => (lower, 1),
    };
    let number: u64 = digits.parse().map_err(|_| "write MiB, or a number with M, G or T".to_owned())?;
    number.checked_mul(scale).ok_or_else(|| "more than a number can hold".to_owned())
}

fn variable(text: &OsStr) -> Result<OsString, String> {
    if text.is_empty() || text.as_bytes().starts_with(b"=") {
        return Err("the variable has no name".into());
    }
    Ok(text.to_owned())
}

fn user(text: &OsStr) -> Result<(OsString, Option<OsString>), String> {
    let mut parts = text.as_bytes().splitn(2, |b| *b == b':');
    let part = |b: &[u8]| OsString::from_vec(b.to_vec());
    let user = parts.next().unwrap_or_default();
    let group = parts.next();
    if user.is_empty() || group.is_some_and(<[u8]>::is_empty) {
        return Err("write USER or USER:GROUP".into());
    }
    Ok((part(user), group.map(part)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn volumes() {
        use krun::Cache;
        let v = |h: &str, g: &str, read_only, cache| {
            Ok(Volume { host: h.into(), guest: g.into(), read_only, cache, locks: false, dax: None })
        };
        assert_eq!(volume(OsStr::new("/a:/b")), v("/a", "/b", false, Cache::Auto));
        assert_eq!(volume(OsStr::new("a:b:/c:ro")), v("a:b", "/c", true, Cache::Auto));
        assert_eq!(volume(OsStr::new("a:/c:cache=writeback")), v("a", "/c", false, Cache::WriteBack));
        assert_eq!(volume(OsStr::new("a:/c:cache=never:ro")), v("a", "/c", true, Cache::Never));
        assert!(volume(OsStr::new("a:/c:locks:ro")).unwrap().locks);
        let dax = |text: &str| volume(OsStr::new(text)).unwrap().dax;
        assert_eq!(dax("a:/c:dax=512M:ro"), Some(krun::Dax { window: 512 << 20, from: 1 << 20 }));
        assert_eq!(dax("a:/c:dax-from=0:dax=1g"), Some(krun::Dax { window: 1 << 30, from: 0 }));
        assert_eq!((size("512"), size("1g")), (Ok(512 << 20), Ok(1 << 30)));
        assert!(size("17592186044416").is_err(), "2^44 MiB");
        let bad = ["/a", ":/b", "/a:b", "/a:", "/a:ro", "/a:/b:cache=some", "/a:/b:cache=", "ro"];
        for bad in bad.into_iter().chain(["a:/b:dax=", "a:/b:dax=x", "a:/b:dax-from=1", "a:/b:dax=99999999T"])
        {
            assert!(volume(OsStr::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn vsock_ports() {
        let port = vsock(OsStr::new("1234:/a:b")).unwrap();
        assert_eq!((port.port, port.path.to_str()), (1234, Some("/a:b")));
        assert_eq!(port.direction, krun::VsockDirection::FromGuest);
        assert_eq!(vsock(OsStr::new("0:x:listen")).unwrap().direction, krun::VsockDirection::FromHost);
        let port = vsock(OsStr::new("7:/a:listen=seqpacket")).unwrap();
        assert_eq!((port.path.to_str(), port.socket), (Some("/a"), krun::VsockType::SeqPacket));
        let port = vsock(OsStr::new("7:/a=seqpacket")).unwrap();
        assert_eq!((port.path.to_str(), port.socket), (Some("/a=seqpacket"), krun::VsockType::Stream));
        for bad in ["/a", "x:/a", "-1:/a", "4294967295:/a", "1:", "1::listen", ""] {
            assert!(vsock(OsStr::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        for (text, mib) in [("128", 128), ("2G", 2048), ("512MiB", 512), ("1t", 1 << 20)] {
            assert_eq!(memory(text), Ok(mib));
        }
        for bad in ["", "x", "-1", "1.5G", "99999999999999999999"] {
            assert!(memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn arguments_need_not_be_utf8() {
        let odd = OsString::from_vec(vec![b'a', 0xff]);
        let words: Vec<OsString> =
            ["krun", "run", "--root", "/r", "--"].iter().map(Into::into).chain([odd.clone()]).collect();
        let Command::Run(run) = Cli::try_parse_from(words).unwrap().command else { panic!("not run") };
        assert_eq!(run.command, [odd]);
    }
}
