//! From a configuration to a machine and its devices.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use krun_devices::balloon::{Balloon, BalloonHandle};
use krun_devices::block::BlockHandle;
use krun_devices::console::{ConsoleHandle, ConsoleSpec, MAX_PORTS, Numbered, PortSpec};
use krun_devices::fs::{self, ExitCode, FsSpec};
use krun_devices::input;
use krun_devices::rng::Rng;
use krun_devices::tty::RawTerminal;
use krun_devices::vhost_user::VhostUserHandle;
use krun_devices::vsock::VsockHandle;
use krun_machine::{SerialSpec, Spec};
use krun_virtio::VirtioDevice;
use krun_wire as wire;

use crate::config::{Cache, Dax, Overlay, OverlayContent, ROOT_TAG};
use crate::{Console, Error, INIT, Port, Share, VmConfig};
use crate::{disk, net, vhost_user};

/// What [`crate::Vm::start`] starts.
pub struct Parts {
    pub spec: Spec,
    pub devices: Vec<Box<dyn VirtioDevice>>,
    pub exit_code: Arc<ExitCode>,
    pub control: Option<UnixStream>,
    pub consoles: Vec<ConsoleHandle>,
    pub vhost_user: Vec<VhostUserHandle>,
    pub vsock: Option<VsockHandle>,
    /// Terminals to put in raw mode while the VM runs.
    pub terminals: Vec<Arc<RawTerminal>>,
    pub balloon: Option<BalloonHandle>,
    pub disks: Vec<BlockHandle>,
}

/// The ports of one console device, and what init must know about them.
#[derive(Default)]
struct Ports {
    list: Vec<PortSpec>,
    terminals: Vec<Arc<RawTerminal>>,
    stdio: wire::Stdio,
}

impl Ports {
    /// Notes a terminal to be put in raw mode.
    fn raw(&mut self, fd: &OwnedFd) -> Result<Option<Arc<RawTerminal>>, Error> {
        let terminal = RawTerminal::new(fd).map_err(|source| Error::Terminal { source })?.map(Arc::new);
        self.terminals.extend(terminal.clone());
        Ok(terminal)
    }
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, Error> {
    fd.try_clone().map_err(|source| Error::Host { what: "duplicate a descriptor", source })
}

/// Standard streams: terminals share `hvc0`, other descriptors get a port each.
fn standard(
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    error: Option<OwnedFd>,
    verbose: bool,
) -> Result<Ports, Error> {
    let mut ports = Ports::default();
    let is_tty = |fd: &Option<OwnedFd>| fd.as_ref().is_some_and(IsTerminal::is_terminal);
    let (tty_in, tty_out, tty_err) = (is_tty(&input), is_tty(&output), is_tty(&error));
    // A terminal session needs both directions; a lone terminal is a stream like any other.
    let session = tty_in && tty_out;
    let log = match (&error, verbose && !session) {
        (Some(fd), true) => Some(duplicate(fd)?),
        _ => None,
    };
    let mut mask = 0;
    let mut streams = Vec::new();
    let mut console = PortSpec::console(None, log, None);
    for (n, (fd, tty)) in [(input, tty_in), (output, tty_out), (error, tty_err)].into_iter().enumerate() {
        let Some(fd) = fd else {
            continue;
        };
        if session && tty {
            match n {
                0 => {
                    console.terminal = ports.raw(&fd)?;
                    console.input = Some(fd);
                }
                1 => console.output = Some(fd),
                _ => {}
            }
            continue;
        }
        mask |= 1 << n;
        let (input, output) = if n == 0 { (Some(fd), None) } else { (None, Some(fd)) };
        streams.push(PortSpec::stream(wire::STDIO_PORTS[n], input, output));
    }
    ports.stdio = match session {
        // Its number depends on the devices before.
        true => wire::Stdio::Terminal { number: 0, ports: mask },
        false => wire::Stdio::Ports(mask),
    };
    ports.list.push(console);
    ports.list.extend(streams);
    Ok(ports)
}

/// Terminals that Linux makes for consoles, `/dev/hvc0` and so on (`HVC_ALLOC_TTY_ADAPTERS`). Later ones are there for the
/// kernel's messages only.
const TERMINALS_MAX: u32 = 8;

fn terminals(ports: &[PortSpec]) -> usize {
    ports.iter().filter(|port| port.is_console()).count()
}

fn named(described: Vec<Port>) -> Result<Ports, Error> {
    let mut ports = Ports::default();
    for port in described {
        let spec = match port {
            Port::Terminal { name, tty } => {
                let (terminal, output) = (ports.raw(&tty)?, duplicate(&tty)?);
                PortSpec { name, terminal, ..PortSpec::console(Some(tty), Some(output), None) }
            }
            Port::Stream { name, input, output } => PortSpec::stream(name, input, output),
        };
        ports.list.push(spec);
    }
    Ok(ports)
}

/// The file that init reads.
fn init_config(config: &VmConfig, stdio: wire::Stdio) -> Vec<u8> {
    let mut init = wire::InitConfig { stdio, verbose: config.verbose, ..wire::InitConfig::default() };
    init.block_root = config.root_disk.as_ref().map(crate::RootDisk::wire);
    init.dhcp = net::dhcp(&config.nets);
    config.command.apply(&mut init);
    init.mounts = config
        .shares
        .iter()
        .filter_map(|share| {
            let path = share.mount.as_ref()?.as_os_str().as_encoded_bytes().to_vec();
            Some(wire::Mount { tag: share.tag.clone(), path, read_only: share.read_only })
        })
        .collect();
    init.encode()
}

fn fs_overlay(overlay: Overlay) -> fs::Overlay {
    let mode = overlay.mode;
    let content = match overlay.content {
        OverlayContent::File { data, one_shot } => {
            fs::Content::File { data: fs::FileData::new(data), mode, one_shot }
        }
        OverlayContent::Directory => fs::Content::Dir { mode },
    };
    fs::Overlay { path: overlay.path, content, listed: true }
}

/// A file of init's own: found by its name, not listed, so that the guest sees its root as it is.
fn own_file(path: &str, mode: u32, data: impl Into<fs::FileData>) -> fs::Overlay {
    let content = fs::Content::File { data: data.into(), mode, one_shot: false };
    fs::Overlay { path: path.trim_start_matches('/').into(), content, listed: false }
}

fn share_device(
    share: Share,
    own: Vec<fs::Overlay>,
    exit: &Arc<ExitCode>,
    quota: &fs::Quota,
) -> Result<Box<dyn VirtioDevice>, Error> {
    let is_root = share.tag == ROOT_TAG;
    let spec = FsSpec {
        tag: share.tag,
        source: share.source,
        read_only: share.read_only,
        overlays: own.into_iter().chain(share.overlays.into_iter().map(fs_overlay)).collect(),
        exit_code: is_root.then(|| Arc::clone(exit)),
        dax: share.dax.map(|dax| fs::DaxSpec { size: dax.window, from: dax.from }),
        cache: match share.cache {
            Cache::Never => fs::CachePolicy::NEVER,
            Cache::Auto => fs::CachePolicy::AUTO,
            Cache::Always => fs::CachePolicy::ALWAYS,
            Cache::WriteBack => fs::CachePolicy::WRITE_BACK,
        },
        share_locks: share.locks,
        quota: quota.clone(),
    };
    Ok(Box::new(fs::Fs::new(spec)?))
}

/// The kernel's command line, without the devices.
fn command_line(config: &VmConfig, log: Option<usize>) -> String {
    let console = match (&config.kernel_console, log) {
        (Some(name), _) => name.clone(),
        (None, log) => format!("hvc{}", log.unwrap_or(0)),
    };
    // Mounted as what it is, so that the guest need not ask to find out that it cannot write.
    let mode = if config.shares.iter().any(|s| s.tag == ROOT_TAG && s.read_only) { "ro" } else { "rw" };
    let mut line = format!(
        "reboot=k,panic_warm panic=-1 panic_print=0 nomodule console={console} rootfstype=virtiofs {mode} no-kvmapf"
    );
    if !config.verbose && log.is_none() {
        line.push_str(" quiet");
    }
    if config.init {
        line.push_str(" init=");
        line.push_str(wire::INIT_PATH);
    }
    if config.serial.is_some() {
        // A kernel that is built to start fast looks for serial ports only when told.
        line.push_str(" 8250.nr_uarts=1");
    }
    for word in &config.kernel_args {
        line.push(' ');
        line.push_str(word);
    }
    line
}

/// Builds every device. The order is that of their addresses: the root first, as it is needed first.
pub fn assemble(mut config: VmConfig) -> Result<Parts, Error> {
    if let Some(text) = config.command.string_with_nul() {
        return Err(Error::Nul { text: text.to_owned() });
    }
    let (host_end, guest_end) = match config.init {
        true => UnixStream::pair()
            .map(|(host, guest)| (Some(host), Some(guest)))
            .map_err(|source| Error::Host { what: "create the control socket", source })?,
        false => (None, None),
    };
    if let Some(stream) = &host_end {
        stream
            .set_nonblocking(true)
            .map_err(|source| Error::Host { what: "set up the control socket", source })?;
    }
    let Consoles { devices: console_devices, handles, terminals, stdio, log, numbered } =
        consoles(&mut config, guest_end)?;
    let exit_code = Arc::new(ExitCode::default());
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    let mut own = Vec::new();
    if config.init {
        own.push(own_file(wire::INIT_PATH, 0o755, INIT));
        own.push(own_file(wire::CONFIG_PATH, 0o400, init_config(&config, stdio)));
    }
    let cmdline = command_line(&config, log);
    let mut shares = std::mem::take(&mut config.shares);
    match shares.iter().position(|s| s.tag == ROOT_TAG) {
        Some(at) => shares[..=at].rotate_right(1),
        None => shares.insert(0, Share { source: None, ..Share::root("") }),
    }
    let windows = shares.iter().filter_map(|s| s.dax).map(|dax| dax.window);
    let windows = windows.fold(0u64, u64::saturating_add);
    if windows > Dax::MAX_TOTAL {
        return Err(Error::DaxWindows { total: windows });
    }
    let quota = fs::Quota::for_memory(u64::from(config.memory_mib) << 20);
    for share in shares {
        devices.push(share_device(share, std::mem::take(&mut own), &exit_code, &quota)?);
    }
    let (disk_devices, disks) = disk::devices(&mut config)?;
    devices.extend(disk_devices);
    devices.extend(net::devices(&mut config)?);
    devices.extend(console_devices);
    if config.rng {
        devices.push(Box::new(Rng::new()));
    }
    for device in config.inputs.drain(..) {
        devices.push(Box::new(input::Input::new(device.config, device.source)));
    }
    let vsock = config.vsock.take().map(crate::Vsock::device).transpose()?;
    let vsock_handle = vsock.as_ref().map(|device| device.handle());
    devices.extend(vsock.map(|device| Box::new(device) as Box<dyn VirtioDevice>));
    let shared_memory = !config.vhost_user.is_empty();
    let (elsewhere, vhost_user): (Vec<_>, Vec<_>) =
        vhost_user::devices(&mut config, numbered.as_ref())?.into_iter().unzip();
    devices.extend(elsewhere);
    let mut balloon = None;
    if config.balloon {
        let fail = |source| Error::Host { what: "create the memory balloon", source };
        let device = Balloon::new().map_err(fail)?;
        balloon = Some(device.handle());
        devices.push(Box::new(device));
    }
    let spec = Spec {
        vcpus: u32::from(config.vcpus),
        ram_mib: u64::from(config.memory_mib),
        cmdline,
        kernel: config.kernel,
        serial: config.serial.map(|s| SerialSpec { input: s.input, output: s.output }),
        split_irqchip: config.split_irqchip,
        nested: config.nested,
        oem_strings: config.oem_strings,
        huge_pages: config.huge_pages,
        shared_memory,
        ..Spec::default()
    };
    Ok(Parts {
        spec,
        devices,
        exit_code,
        control: host_end,
        consoles: handles,
        vhost_user,
        vsock: vsock_handle,
        terminals,
        balloon,
        disks,
    })
}

#[derive(Default)]
struct Consoles {
    devices: Vec<Box<dyn VirtioDevice>>,
    handles: Vec<ConsoleHandle>,
    terminals: Vec<Arc<RawTerminal>>,
    stdio: wire::Stdio,
    /// Number of the console (`hvcN`) that takes the kernel's messages, if they have their own.
    log: Option<usize>,
    /// Of the last device with terminals.
    numbered: Option<Numbered>,
}

/// The console devices. One of them also carries the control port, and one the kernel's messages. The guest numbers
/// its terminals in the order of the devices and their ports.
fn consoles(config: &mut VmConfig, mut control: Option<UnixStream>) -> Result<Consoles, Error> {
    let mut list = std::mem::take(&mut config.consoles);
    let mut log = config.kernel_log.take();
    let (mut all, mut stdio) = (Consoles::default(), None);
    // Both ports go where there is room for them, else to a console of their own.
    let needed = usize::from(control.is_some()) + usize::from(log.is_some());
    let room = |c: &Console| {
        matches!(c, Console::Standard { .. })
            || matches!(c, Console::Ports(p) if p.len() + needed <= MAX_PORTS)
    };
    if needed > 0 && !list.iter().any(room) {
        list.push(Console::Standard { input: None, output: None, error: None });
    }
    let mut before = 0;
    for console in list {
        let has_room = room(&console);
        let mut ports = match console {
            Console::Standard { input, output, error } => standard(input, output, error, config.verbose)?,
            Console::Ports(described) => named(described)?,
        };
        if has_room && let Some(output) = log.take() {
            all.log = Some(before + terminals(&ports.list));
            ports.list.push(PortSpec::console(None, Some(output), None));
        }
        if let wire::Stdio::Terminal { number, .. } = &mut ports.stdio {
            *number = u32::try_from(before).unwrap_or(u32::MAX);
        }
        let count = terminals(&ports.list);
        before += count;
        if has_room && let Some(stream) = control.take() {
            let port = PortSpec::duplex(wire::CONTROL_PORT, stream.into())
                .map_err(|source| Error::Host { what: "duplicate the control socket", source })?;
            // Read here, and what init said at the end only after the end.
            ports.list.push(PortSpec { waited_for: false, ..port });
        }
        // The first device that has standard streams serves the workload.
        if !matches!(ports.stdio, wire::Stdio::Console) {
            stdio.get_or_insert(ports.stdio);
        }
        let mut device = krun_devices::console::Console::new(ConsoleSpec { ports: ports.list })?;
        if count > 0 {
            if let Some(before) = &all.numbered {
                let fail = |source| Error::Host { what: "create a timer", source };
                device.after(before.next().map_err(fail)?);
            }
            all.numbered = Some(device.numbered().clone());
        }
        all.handles.push(device.handle());
        all.terminals.extend(ports.terminals);
        all.devices.push(Box::new(device));
    }
    all.stdio = stdio.unwrap_or_default();
    match all.stdio {
        // Without our init nobody looks for it.
        wire::Stdio::Terminal { number, .. } if config.init && number >= TERMINALS_MAX => {
            Err(Error::TerminalNumber { number, limit: TERMINALS_MAX })
        }
        _ => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Command;

    #[test]
    fn pipes_become_ports_and_nothing_becomes_nothing() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let ports = standard(None, Some(writer.into()), None, false).unwrap();
        assert_eq!(ports.stdio, wire::Stdio::Ports(0b010));
        let names: Vec<_> = ports.list.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["", "krun-stdout"]);
    }

    #[test]
    fn the_control_port_takes_no_room_from_consoles_that_are_full() {
        let console = |ports: usize| {
            let port = |n| Port::Stream { name: format!("p{n}"), input: None, output: None };
            Console::Ports((0..ports).map(port).collect())
        };
        // One device per console, and one for the control port where none has room.
        for (given, devices) in [(vec![], 1), (vec![31], 1), (vec![32], 2), (vec![32, 4], 2)] {
            let consoles = given.iter().map(|n| console(*n)).collect();
            let config = VmConfig {
                consoles,
                command: Command::new("x"),
                rng: false,
                balloon: false,
                ..VmConfig::default()
            };
            let parts = assemble(config).unwrap();
            let count = parts.devices.iter().filter(|d| d.info().id == 3).count();
            assert_eq!(count, devices, "{given:?}");
        }
        let config =
            VmConfig { consoles: vec![console(33)], command: Command::new("x"), ..VmConfig::default() };
        let text = assemble(config).err().unwrap().to_string();
        assert!(text.contains("1 to 32 ports, not 33"), "{text}");
    }

    #[test]
    fn the_workload_s_terminal_has_the_number_of_its_place() {
        let tty =
            || OwnedFd::from(std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap());
        let terminal = || Port::Terminal { name: String::new(), tty: tty() };
        let stream = Port::Stream { name: "s".into(), input: None, output: None };
        let streams = || Some(tty());
        let own = Console::Standard { input: streams(), output: streams(), error: None };
        let consoles =
            vec![Console::Ports(vec![terminal(), stream, terminal()]), own, Console::Ports(vec![terminal()])];
        let mut config = VmConfig { consoles, ..VmConfig::default() };
        let all = super::consoles(&mut config, None).unwrap();
        assert_eq!(all.stdio, wire::Stdio::Terminal { number: 2, ports: 0 });
        assert!(all.numbered.is_some());
        config.consoles =
            vec![Console::Ports(vec![Port::Stream { name: "s".into(), input: None, output: None }])];
        assert!(super::consoles(&mut config, None).unwrap().numbered.is_none());
    }

    #[test]
    fn the_workload_s_terminal_is_one_that_linux_makes() {
        let tty =
            || OwnedFd::from(std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap());
        let console = |terminals: usize| {
            let port = |_| Port::Terminal { name: String::new(), tty: tty() };
            Console::Ports((0..terminals).map(port).collect())
        };
        let own = || Console::Standard { input: Some(tty()), output: Some(tty()), error: None };
        let config = |consoles, init| VmConfig { consoles, init, ..VmConfig::default() };
        let seven = vec![console(3), console(4), own(), console(2)];
        let all = super::consoles(&mut config(seven, true), None).unwrap();
        assert_eq!(all.stdio, wire::Stdio::Terminal { number: 7, ports: 0 });
        let eight = || vec![console(3), console(5), own()];
        let text = super::consoles(&mut config(eight(), true), None).err().unwrap().to_string();
        assert!(text.contains("hvc8") && text.contains("8 terminals") && text.contains("before"), "{text}");
        assert!(super::consoles(&mut config(eight(), false), None).is_ok());
        // Streams need no terminal.
        let streams =
            Console::Standard { input: None, output: Some(std::io::pipe().unwrap().1.into()), error: None };
        assert!(super::consoles(&mut config(vec![console(9), streams], true), None).is_ok());
    }

    #[test]
    fn the_root_comes_first_and_the_others_keep_their_order() {
        let dir = std::env::temp_dir();
        let shares = vec![Share::new("a", &dir), Share::new("b", &dir), Share::root(&dir)];
        let config = VmConfig {
            shares,
            command: Command::new("x"),
            rng: false,
            balloon: false,
            ..VmConfig::default()
        };
        let parts = assemble(config).unwrap();
        let names: Vec<_> = parts.devices.iter().map(|d| d.info().id).collect();
        assert_eq!(names, [26, 26, 26, 3]);
        assert!(parts.spec.cmdline.contains("init=/init.krun"));
    }

    #[test]
    fn a_back_end_that_is_not_there_is_named() {
        let device = crate::VhostUser::new(crate::DeviceKind::RNG, "/no/such");
        let config = VmConfig { vhost_user: vec![device], command: Command::new("x"), ..VmConfig::default() };
        let error = assemble(config).err().unwrap();
        assert!(error.to_string().contains("/no/such"), "{error}");
        assert_eq!(error.raw_os_error(), Some(2));
    }

    #[test]
    fn a_nul_byte_is_named() {
        let config = VmConfig { command: Command::new("a\0b"), ..VmConfig::default() };
        assert!(matches!(assemble(config), Err(Error::Nul { text }) if text == "a\0b"));
    }
}
