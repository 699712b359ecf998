//! What a VM is made of, as plain values.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

pub use krun_machine::{Kernel, KernelFormat};

use crate::{Command, Disk, Input, Net, RootDisk, VhostUser, Vsock};

/// Tag of the share that is the guest's root.
pub const ROOT_TAG: &str = "/dev/root";

/// Everything that [`crate::Vm::start`] needs.
#[derive(Debug)]
pub struct VmConfig {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// RAM is in huge pages that the host's administrator has set aside (`vm.nr_hugepages`). Memory that the guest
    /// frees is not given back then.
    pub huge_pages: bool,
    /// The kernel to boot.
    pub kernel: Kernel,
    /// Words added to the kernel's command line.
    pub kernel_args: Vec<String>,
    /// Value of `console=`; `None`: `hvc0`.
    pub kernel_console: Option<String>,
    /// virtio-fs shares. The one tagged [`ROOT_TAG`] is the root; without one the root is empty but for
    /// init.
    pub shares: Vec<Share>,
    /// Disks, in the order of their names in the guest.
    pub disks: Vec<Disk>,
    /// Where init moves before it runs the workload; without it, it stays in the root share.
    pub root_disk: Option<RootDisk>,
    /// The workload.
    pub command: Command,
    /// Put the built-in init at `/init.krun` and have it run [`VmConfig::command`].
    pub init: bool,
    /// virtio-console devices.
    pub consoles: Vec<Console>,
    /// A 16550 serial port, `ttyS0`.
    pub serial: Option<Serial>,
    /// Input devices, `/dev/input/event0` and so on.
    pub inputs: Vec<Input>,
    /// Network interfaces, `eth0` and so on, in order.
    pub nets: Vec<Net>,
    /// A socket device.
    pub vsock: Option<Vsock>,
    /// Devices whose other half is another process, which is running. With any of them all of RAM is in a file that
    /// those processes map; most hosts give such memory no large pages.
    pub vhost_user: Vec<VhostUser>,
    /// A virtio entropy device.
    pub rng: bool,
    /// A memory balloon: memory that the guest has freed goes back to the host by itself, and
    /// [`crate::Vm::set_balloon`] asks for more.
    pub balloon: bool,
    /// Emulate the IOAPIC in this process (x86_64).
    pub split_irqchip: bool,
    /// Let the guest use the processor's virtualisation.
    pub nested: bool,
    /// Strings that the guest finds in its SMBIOS tables (`dmidecode -t 11`), if its kernel reads those.
    pub oem_strings: Vec<String>,
    /// Takes the messages of the guest's kernel, of all levels, and nothing else. They go through a console of their
    /// own (`hvcN`), from when Linux has found it; for earlier ones there is `serial`.
    pub kernel_log: Option<OwnedFd>,
    /// Kernel messages and init's timings go to the console.
    pub verbose: bool,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 512,
            huge_pages: false,
            kernel: Kernel::Bundle(None),
            kernel_args: Vec::new(),
            kernel_console: None,
            shares: Vec::new(),
            disks: Vec::new(),
            root_disk: None,
            command: Command::default(),
            init: true,
            consoles: Vec::new(),
            serial: None,
            inputs: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            vhost_user: Vec::new(),
            rng: true,
            balloon: true,
            split_irqchip: false,
            nested: false,
            oem_strings: Vec::new(),
            kernel_log: None,
            verbose: false,
        }
    }
}

/// A host directory that the guest sees.
#[derive(Debug, Clone)]
pub struct Share {
    /// virtio-fs tag, 1 to 36 bytes.
    pub tag: String,
    /// The directory; `None`: one that holds nothing but `overlays`.
    pub source: Option<PathBuf>,
    /// The guest cannot change it.
    pub read_only: bool,
    /// For how long the guest believes what it knows of it.
    pub cache: Cache,
    /// Locks of the guest's programs and of this host's exclude each other. Whoever waits for one in the guest cannot
    /// be interrupted in that, not even by a kill.
    pub locks: bool,
    /// A window into which the guest maps files, so that it needs no copies of its own.
    pub dax: Option<Dax>,
    /// Files and directories that only the guest sees.
    pub overlays: Vec<Overlay>,
    /// Where init mounts it (absolute); `None`: the guest mounts it by its tag.
    pub mount: Option<PathBuf>,
}

impl Share {
    /// A writable share.
    pub fn new(tag: impl Into<String>, source: impl Into<PathBuf>) -> Self {
        Self {
            tag: tag.into(),
            source: Some(source.into()),
            read_only: false,
            cache: Cache::Auto,
            locks: false,
            dax: None,
            overlays: Vec::new(),
            mount: None,
        }
    }

    /// The guest's root.
    pub fn root(source: impl Into<PathBuf>) -> Self {
        Self::new(ROOT_TAG, source)
    }
}

/// A DAX window of a share.
///
/// The guest maps large files into it, in pieces of 2 MiB: they are in memory once, for the host and all guests together;
/// what one side writes to a file the other one reads at once, also through mappings (`MAP_SHARED`); and a program that
/// writes inside of a file makes no requests. The first access to each page costs more than reading it by a request, and
/// the guest's kernel keeps 1/64 of the window's size in its own memory to manage it.
///
/// The guest needs no mount option (Linux 5.17, with `CONFIG_FUSE_DAX`; without, the window stays unused). Files on
/// overlayfs and 9p are mapped only if the share is read-only and its cache [`Cache::Always`], those on network file
/// systems and FUSE not at all. All files of the share say that their blocks are of 4 KiB (`st_blksize`), for Linux syncs no
/// others that are mapped.
///
/// When the host makes a file shorter that is mapped, the guest finds zeroes in place of what is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dax {
    /// Bytes, a multiple of 2 MiB; at most 16 GiB, and 32 GiB for all shares of a guest. A guest that is up to no good can
    /// have this process use as much memory beside its RAM.
    pub window: u64,
    /// Files of at least so many bytes are mapped. Each takes a piece of the window or more.
    pub from: u64,
}

impl Dax {
    /// Smallest file that is mapped unless [`Dax::from`] says otherwise.
    pub const FROM: u64 = 1 << 20;
    /// What a window's size is a multiple of.
    pub const STEP: u64 = krun_devices::fs::DAX_CHUNK;
    /// Largest window of a share.
    pub const MAX: u64 = krun_devices::fs::DAX_WINDOW_MAX;
    /// Most for all shares of a guest together.
    pub const MAX_TOTAL: u64 = 2 * Self::MAX;

    /// A window of so many bytes.
    pub fn new(window: u64) -> Self {
        Self { window, from: Self::FROM }
    }
}

/// What a guest keeps of a share, and for how long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cache {
    /// Nothing: each side sees at once what the other one does.
    Never,
    /// The guest sees within a second, and with the next open of a file, what the host has changed.
    #[default]
    Auto,
    /// All there is room for: the host changes nothing while the guest runs.
    Always,
    /// As [`Cache::Always`], and what the guest writes reaches the host when the file is closed or synced, or some
    /// seconds later. For programs that write one file in many small pieces; many files or large writes take more
    /// requests with it, not fewer. What was not synced is lost when the machine is killed, as it would be on a disk.
    WriteBack,
}

/// A file or directory that exists in a share only for the guest.
#[derive(Clone)]
pub struct Overlay {
    /// Path relative to the share.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// What it is.
    pub content: OverlayContent,
}

/// What an [`Overlay`] is.
#[derive(Clone)]
pub enum OverlayContent {
    /// A file.
    File {
        /// Its bytes.
        data: Arc<dyn AsRef<[u8]> + Send + Sync>,
        /// It disappears once it was opened and closed.
        one_shot: bool,
    },
    /// An empty directory: a mount point.
    Directory,
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match &self.content {
            OverlayContent::File { data, one_shot } => {
                format!("file of {} bytes, one_shot {one_shot}", (**data).as_ref().len())
            }
            OverlayContent::Directory => "directory".to_owned(),
        };
        write!(f, "Overlay({}, mode {:o}, {kind})", self.path.display(), self.mode)
    }
}

/// A virtio-console device.
#[derive(Debug)]
pub enum Console {
    /// The workload's standard streams. A terminal becomes the guest's console and the workload's
    /// controlling terminal; another descriptor reaches the workload as it is; `None` is `/dev/null`.
    Standard {
        /// Standard input.
        input: Option<OwnedFd>,
        /// Standard output.
        output: Option<OwnedFd>,
        /// Standard error.
        error: Option<OwnedFd>,
    },
    /// Ports by name.
    Ports(Vec<Port>),
}

impl Console {
    /// The standard streams of this process.
    ///
    /// # Errors
    /// A stream cannot be duplicated for another reason than being closed.
    pub fn inherit() -> std::io::Result<Self> {
        use std::os::fd::AsFd;
        fn dup(fd: std::os::fd::BorrowedFd<'_>) -> std::io::Result<Option<OwnedFd>> {
            match fd.try_clone_to_owned() {
                Ok(fd) => Ok(Some(fd)),
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::BADF.raw_os_error()) => Ok(None),
                Err(e) => Err(e),
            }
        }
        Ok(Self::Standard {
            input: dup(std::io::stdin().as_fd())?,
            output: dup(std::io::stdout().as_fd())?,
            error: dup(std::io::stderr().as_fd())?,
        })
    }
}

/// A port of a console device.
#[derive(Debug)]
pub enum Port {
    /// A terminal of the guest. Linux makes a file (`/dev/hvcN`) for the first eight only.
    Terminal {
        /// Port name; may be empty.
        name: String,
        /// The terminal on this side.
        tty: OwnedFd,
    },
    /// A byte stream, `/dev/vportNpM` in the guest.
    Stream {
        /// Port name.
        name: String,
        /// Read here, for the guest.
        input: Option<OwnedFd>,
        /// Written here, by the guest.
        output: Option<OwnedFd>,
    },
}

/// A 16550 serial port.
#[derive(Debug)]
pub struct Serial {
    /// Read here, for the guest.
    pub input: Option<OwnedFd>,
    /// Written here, by the guest.
    pub output: Option<OwnedFd>,
}
