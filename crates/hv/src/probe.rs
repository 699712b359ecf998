//! Whether this host can run guests, and what to do if it cannot.
//!
//! An openable /dev/kvm says little: some hosts offer one that interprets kernel mode in software,
//! far too slowly and without instructions every kernel uses. So the check runs a few instructions
//! of 64-bit kernel mode and looks at what happens and how long it takes.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use krun_memory::{Bytes, GuestAddress, Mapping};

use crate::kvm::DEVICE;
use crate::{
    BootState, Error, Exit, Hypervisor, Kicker, MapGuard, Platform, Prot, Reply, Result, Table, Vcpu, Vm,
    VmConfig, flat_gdt,
};

/// The answer of [`probe`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Probe {
    /// What is wrong; empty when guests can run.
    pub findings: Vec<Finding>,
    /// Most vCPUs a VM can have, where the device could be asked.
    pub max_vcpus: Option<u32>,
    /// Whether guests may use hardware virtualisation themselves, where the host says so.
    pub nested: Option<bool>,
}

/// Something that keeps guests from running. `Display` is one sentence about what is the case.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The CPU shows no virtualisation.
    NoVirtualisation {
        /// This host is a virtual machine itself.
        guest: bool,
    },
    /// There is no device, but the CPU could.
    NoDevice {
        /// The kernel module for this CPU.
        module: &'static str,
        /// The kernel has KVM, so only the device file is missing here.
        loaded: bool,
    },
    /// The user may not open the device.
    NoPermission {
        /// A device rule (of a container) forbids it, not the file's mode.
        rule: bool,
    },
    /// The device cannot be opened for another reason, or refused a request.
    Refused {
        /// The error in words.
        error: String,
    },
    /// The device speaks another language than ours.
    ApiVersion {
        /// What it answered.
        found: i32,
    },
    /// The host kernel lacks capabilities.
    Missing {
        /// Their names.
        capabilities: Vec<&'static str>,
    },
    /// Kernel mode runs far too slowly for hardware.
    Software {
        /// Instructions per microsecond, at most.
        mips: u32,
        /// An instruction that does not work at all.
        unknown: Option<&'static str>,
    },
    /// An instruction that every kernel uses does not work, although others run fast.
    Instruction {
        /// Its name.
        name: &'static str,
        /// What KVM said.
        error: String,
    },
    /// The trial did not end in time.
    Hung,
}

impl Probe {
    /// Whether guests can run here.
    pub fn usable(&self) -> bool {
        self.findings.is_empty()
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.usable() {
            f.write_str("KVM works here")?;
            if let Some(max) = self.max_vcpus {
                write!(f, ", up to {max} vCPUs")?;
            }
            if let Some(nested) = self.nested {
                write!(f, ", nested virtualisation {}", if nested { "on" } else { "off" })?;
            }
            return Ok(());
        }
        for (i, finding) in self.findings.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            finding.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVirtualisation { guest: false } => {
                f.write_str("this host's CPU offers no virtualisation")
            }
            Self::NoVirtualisation { guest: true } => {
                f.write_str("this host is a virtual machine without nested virtualisation")
            }
            Self::NoDevice { module, loaded: false } => {
                write!(f, "there is no {DEVICE}: the kernel module {module} is not loaded")
            }
            Self::NoDevice { loaded: true, .. } => {
                write!(f, "the kernel has KVM, but there is no {DEVICE} here")
            }
            Self::NoPermission { rule: false } => write!(f, "no permission to open {DEVICE}"),
            Self::NoPermission { rule: true } => write!(f, "a device rule forbids opening {DEVICE}"),
            Self::Refused { error } => write!(f, "KVM does not work: {error}"),
            Self::ApiVersion { found } => write!(f, "{DEVICE} speaks API version {found} instead of 12"),
            Self::Missing { capabilities } => write!(f, "this host's KVM lacks {}", capabilities.join(", ")),
            Self::Software { mips, unknown } => {
                write!(
                    f,
                    "software KVM: this host's {DEVICE} interprets kernel mode, at {mips} million \
                     instructions per second"
                )?;
                unknown.map_or(Ok(()), |name| write!(f, ", and does not know {name}"))
            }
            Self::Instruction { name, error } => {
                write!(f, "this host's {DEVICE} cannot run {name} in kernel mode: {error}")
            }
            Self::Hung => write!(f, "a trial guest on {DEVICE} did not come to an end"),
        }
    }
}

impl Finding {
    /// What to do about it, in one sentence or two.
    pub fn remedy(&self) -> String {
        match self {
            Self::NoVirtualisation { guest: false } => {
                "Turn on virtualisation (Intel VT-x, AMD-V or SVM) in the firmware's set-up.".into()
            }
            Self::NoVirtualisation { guest: true } => {
                "Enable nested virtualisation where this virtual machine \
                is run (on a KVM host: kvm_intel or kvm_amd with nested=1, and the CPU passed through)."
                    .into()
            }
            Self::NoDevice { module, loaded: false } => format!("Load the module: sudo modprobe {module}"),
            Self::NoDevice { loaded: true, .. } => {
                format!("In a container, pass the device in: --device {DEVICE}")
            }
            Self::NoPermission { rule: false } => {
                "Add yourself to group kvm and log in again: sudo usermod -aG kvm $USER".into()
            }
            Self::NoPermission { rule: true } => format!("Start the container with --device {DEVICE}"),
            Self::Refused { .. } => "Another hypervisor may hold the CPU's virtualisation: end it, and look \
                at the kernel's log (dmesg)."
                .into(),
            Self::ApiVersion { .. } | Self::Missing { .. } => "Use a newer host kernel.".into(),
            Self::Software { .. } | Self::Instruction { .. } | Self::Hung => {
                "Use a host with hardware virtualisation, or run in the emulated host (--accel emulated)."
                    .into()
            }
        }
    }
}

/// Checks this host. Takes a few milliseconds where KVM works and at most about a second where it
/// does not.
pub fn probe() -> Probe {
    let mut probe = Probe { findings: Vec::new(), max_vcpus: None, nested: nested(Path::new("/sys/module")) };
    match Platform::open() {
        Ok(kvm) => {
            probe.max_vcpus = Some(kvm.max_vcpus());
            probe.findings.extend(on_trial(kvm));
        }
        Err(Error::Open { source, .. }) => probe.findings.push(cannot_open(&source)),
        Err(error) => probe.findings.push(finding(error)),
    }
    probe
}

/// Whether guests of this host may use hardware virtualisation themselves; false where it does not say.
pub fn nested_virtualisation() -> bool {
    nested(Path::new("/sys/module")).unwrap_or(false)
}

fn nested(modules: &Path) -> Option<bool> {
    ["kvm_intel", "kvm_amd"].iter().find_map(|module| {
        let value = fs::read_to_string(modules.join(module).join("parameters/nested")).ok()?;
        Some(is_on(&value))
    })
}

/// A module parameter that is a truth value, as a number or a letter.
fn is_on(value: &str) -> bool {
    matches!(value.trim(), "1" | "Y" | "y")
}

fn cannot_open(error: &io::Error) -> Finding {
    match error.raw_os_error() {
        Some(libc::EACCES) => Finding::NoPermission { rule: false },
        Some(libc::EPERM) => Finding::NoPermission { rule: true },
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            absent(&cpu, Path::new("/sys/module/kvm").exists() && error.raw_os_error() == Some(libc::ENOENT))
        }
        _ => Finding::Refused { error: error.to_string() },
    }
}

/// Why there is no device, by the flags of the first CPU.
fn absent(cpuinfo: &str, loaded: bool) -> Finding {
    let line = cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    let has = |flag| line.split_ascii_whitespace().any(|f| f == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => Finding::NoDevice { module: "kvm_intel", loaded },
        (_, true) => Finding::NoDevice { module: "kvm_amd", loaded },
        _ => Finding::NoVirtualisation { guest: has("hypervisor") },
    }
}

fn finding(error: Error) -> Finding {
    match error {
        Error::ApiVersion { found } => Finding::ApiVersion { found },
        Error::Missing { missing } => Finding::Missing { capabilities: missing },
        other => Finding::Refused { error: other.to_string() },
    }
}

/// How often the timed loop is run. The fastest counts, so that a busy host does not look slow.
const TRIALS: usize = 3;
/// Its length: some microseconds in hardware.
const ROUNDS: u32 = 5_000;
const LOOP: u32 = 2 * ROUNDS;
/// Below this, in instructions per microsecond, no hardware runs the loop. An emulator of a whole
/// machine still reaches ten times as much, with an exit that takes it 0.1 ms; interpreters a third.
const FAST_ENOUGH: u32 = 10;
/// How long the trial may take before it is interrupted, and then until it is given up.
const PATIENCE: Duration = Duration::from_millis(400);

/// Tells the steps of the trial apart by the port each ends with.
const PORT_BEGIN: u16 = 0x10;
const PORT_LOOP: u16 = 0x11;
const PORT_POPCNT: u16 = 0x12;
const PORT_CMPXCHG: u16 = 0x13;

const CODE: u64 = 0x1000;
const WORDS: u64 = 0x2000;

/// 64-bit code; RSI points at 16 aligned bytes.
#[rustfmt::skip]
fn code() -> Vec<u8> {
    let [a, b, c, d] = ROUNDS.to_le_bytes();
    let timed = [
        0xb9, a, b, c, d,             // mov $ROUNDS, %ecx
        0xe6, PORT_BEGIN as u8,       // out %al, $PORT_BEGIN
        0xff, 0xc9,                   // 1: dec %ecx
        0x75, 0xfc,                   // jnz 1b
        0xe6, PORT_LOOP as u8,        // out %al, $PORT_LOOP
    ];
    let mut code = timed.repeat(TRIALS);
    code.extend([
        0xf3, 0x0f, 0xb8, 0xc0,       // popcnt %eax, %eax
        0xe6, PORT_POPCNT as u8,      // out %al, $PORT_POPCNT
        0xf0, 0x48, 0x0f, 0xc7, 0x0e, // lock cmpxchg16b (%rsi)
        0xe6, PORT_CMPXCHG as u8,     // out %al, $PORT_CMPXCHG
        0xf4,                         // hlt
    ]);
    code
}

/// Runs the trial on a thread of its own: so that it can be interrupted, or given up, and because
/// the end of a VM takes the kernel tens of milliseconds that nobody need wait for.
fn on_trial(kvm: Platform) -> Vec<Finding> {
    let (tell_kicker, kicker) = mpsc::channel::<Kicker>();
    let (tell, told) = mpsc::channel();
    let spawned = std::thread::Builder::new().name("kvm-probe".into()).spawn(move || {
        let mut guest = match Trial::new(&kvm) {
            Ok(guest) => guest,
            Err(error) => return drop(tell.send(Err(error))),
        };
        let _ = tell_kicker.send(guest.vcpu.kicker());
        let _ = tell.send(judge(&mut guest.vcpu));
    });
    if let Err(e) = spawned {
        return vec![Finding::Refused { error: format!("cannot start a thread: {e}") }];
    }
    let answer = told.recv_timeout(PATIENCE).or_else(|_| {
        if let Ok(kicker) = kicker.try_recv() {
            kicker.kick();
        }
        told.recv_timeout(PATIENCE)
    });
    match answer {
        Ok(answer) => answer.unwrap_or_else(|error| vec![finding(error)]),
        Err(_) => vec![Finding::Hung],
    }
}

/// A guest that is ready to run [`code`]. Fields are dropped in this order.
struct Trial {
    vcpu: <<Platform as Hypervisor>::Vm as Vm>::Vcpu,
    _vm: <Platform as Hypervisor>::Vm,
    _ram: MapGuard,
}

impl Trial {
    fn new(kvm: &Platform) -> Result<Self> {
        let vm = kvm.create_vm(&VmConfig::default())?;
        let refuse = |e: &dyn fmt::Display| {
            Error::call("mmap", "memory for a trial guest", io::Error::other(e.to_string()))
        };
        let ram = Mapping::anonymous(0x6000).map_err(|e| refuse(&e))?;
        let memory = krun_memory::assemble(&[(GuestAddress(0), ram.clone())]).map_err(|e| refuse(&e))?;
        let put = |at, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).map_err(|e| refuse(&e));
        // One 2 MiB page at 0 through a table of each level.
        for (table, entry) in [(0x3000u64, 0x4003u64), (0x4000, 0x5003), (0x5000, 0x83)] {
            put(table, &entry.to_le_bytes())?;
        }
        let gdt = Table { base: GuestAddress(0x800), limit: 31 };
        put(gdt.base.0, &flat_gdt())?;
        put(CODE, &code())?;
        let guard = vm.map(GuestAddress(0), &ram, Prot::ReadWrite)?;
        let mut vcpu = vm.create_vcpu(0)?;
        let cr3 = GuestAddress(0x3000);
        vcpu.set_boot_state(&BootState::Long64 { rip: CODE, rsp: 0x3000, rsi: WORDS, cr3, gdt })?;
        Ok(Self { vcpu, _vm: vm, _ram: guard })
    }
}

/// Takes the guest through its steps.
fn judge(vcpu: &mut impl Vcpu) -> Result<Vec<Finding>> {
    let mut best: Option<Duration> = None;
    let mut unknown = None;
    let loops = [(PORT_BEGIN, "OUT"), (PORT_LOOP, "a loop")].repeat(TRIALS);
    for (step, name) in loops.into_iter().chain([(PORT_POPCNT, "POPCNT"), (PORT_CMPXCHG, "CMPXCHG16B")]) {
        let begin = Instant::now();
        let error = match vcpu.run(Reply::None) {
            Ok(Exit::IoOut { port, .. }) if port == step => {
                if step == PORT_LOOP {
                    best = Some(best.map_or(begin.elapsed(), |b| b.min(begin.elapsed())));
                }
                continue;
            }
            Ok(Exit::Interrupted) if step == PORT_LOOP => {
                best.get_or_insert(begin.elapsed());
                break;
            }
            Ok(Exit::Interrupted) => return Ok(vec![Finding::Hung]),
            Ok(other) => format!("{other:?}"),
            Err(Error::Stopped { stop, .. }) => stop.to_string(),
            Err(other) => return Err(other),
        };
        unknown = Some((name, error));
        break;
    }
    let slow = best.map(mips).filter(|mips| *mips < FAST_ENOUGH);
    Ok(match (slow, unknown) {
        (Some(mips), unknown) => vec![Finding::Software { mips, unknown: unknown.map(|(name, _)| name) }],
        (None, Some((name, error))) => vec![Finding::Instruction { name, error }],
        (None, None) => Vec::new(),
    })
}

/// Speed of a loop that took so long, rounded up.
fn mips(took: Duration) -> u32 {
    let exact = (u128::from(LOOP) * 1000).div_ceil(took.as_nanos().max(1));
    u32::try_from(exact).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_device_is_explained_by_the_cpu() {
        let flags = |f: &str| format!("processor\t: 0\nflags\t\t: fpu {f} sse\nbugs\t: vmx\n");
        let intel = Finding::NoDevice { module: "kvm_intel", loaded: false };
        assert_eq!(absent(&flags("vmx"), false), intel);
        assert!(intel.remedy().ends_with("modprobe kvm_intel"));
        assert_eq!(absent(&flags("svm"), true), Finding::NoDevice { module: "kvm_amd", loaded: true });
        assert_eq!(absent(&flags("svm_lock"), false), Finding::NoVirtualisation { guest: false });
        assert_eq!(absent(&flags("hypervisor"), false), Finding::NoVirtualisation { guest: true });
        assert_eq!(absent("", false), Finding::NoVirtualisation { guest: false });
    }

    #[test]
    fn errors_become_findings() {
        let open = |n| cannot_open(&io::Error::from_raw_os_error(n));
        assert_eq!(open(libc::EACCES), Finding::NoPermission { rule: false });
        assert!(open(libc::EACCES).remedy().contains("usermod -aG kvm"));
        assert_eq!(open(libc::EPERM), Finding::NoPermission { rule: true });
        assert!(matches!(open(libc::EMFILE), Finding::Refused { .. }));
        let missing = finding(Error::Missing { missing: vec!["KVM_CAP_IRQFD"] });
        assert_eq!(missing.to_string(), "this host's KVM lacks KVM_CAP_IRQFD");
    }

    #[test]
    fn nested_comes_from_the_module_in_use() {
        assert_eq!(nested(Path::new("/nowhere")), None);
        assert!(is_on("1\n") && is_on("Y\n") && !is_on("0\n") && !is_on("N\n"));
    }

    #[test]
    fn speeds() {
        assert_eq!(mips(Duration::from_micros(10)), 1000);
        assert_eq!(mips(Duration::from_millis(50)), 1);
        assert_eq!(mips(Duration::ZERO), 10_000_000);
    }

    /// Steps of a pretended guest.
    struct Fake(Vec<Result<Exit>>);

    impl Vcpu for Fake {
        fn kicker(&self) -> Kicker {
            Kicker::from_fn(|| {})
        }
        fn set_boot_state(&mut self, _: &BootState) -> Result<()> {
            Ok(())
        }
        fn run(&mut self, _: Reply) -> Result<Exit> {
            self.0.remove(0)
        }
        fn exits(&self) -> crate::ExitCounts {
            crate::ExitCounts::default()
        }
    }

    fn out(port: u16) -> Result<Exit> {
        Ok(Exit::IoOut { port, size: 1, data: [0; 4] })
    }

    fn stopped() -> Result<Exit> {
        let stop = crate::Stop { reason: "x".into(), registers: String::new(), instruction: vec![] };
        Err(Error::Stopped { vcpu: 0, stop: Box::new(stop) })
    }

    #[test]
    fn each_step_is_judged() {
        let loops: Vec<u16> = [PORT_BEGIN, PORT_LOOP].repeat(TRIALS);
        let steps = |more: &[u16]| loops.iter().chain(more).map(|p| out(*p)).collect::<Vec<_>>();
        assert_eq!(judge(&mut Fake(steps(&[PORT_POPCNT, PORT_CMPXCHG]))).unwrap(), []);
        let mut short = steps(&[PORT_POPCNT]);
        short.push(stopped());
        let found = judge(&mut Fake(short)).unwrap();
        assert_eq!(found, [Finding::Instruction { name: "CMPXCHG16B", error: "x".into() }]);
        let found = judge(&mut Fake(vec![out(PORT_BEGIN), Ok(Exit::TripleFault)])).unwrap();
        assert!(matches!(found[..], [Finding::Instruction { name: "a loop", .. }]));
        assert_eq!(judge(&mut Fake(vec![Ok(Exit::Interrupted)])).unwrap(), [Finding::Hung]);
        let refused = Err(Error::call("KVM_RUN", "", io::Error::other("no")));
        assert!(judge(&mut Fake(vec![refused])).is_err());
    }

    #[test]
    fn slow_loops_are_software() {
        struct Slow(Fake);
        impl Vcpu for Slow {
            fn kicker(&self) -> Kicker {
                self.0.kicker()
            }
            fn set_boot_state(&mut self, _: &BootState) -> Result<()> {
                Ok(())
            }
            fn run(&mut self, reply: Reply) -> Result<Exit> {
                std::thread::sleep(Duration::from_millis(4));
                self.0.run(reply)
            }
            fn exits(&self) -> crate::ExitCounts {
                self.0.exits()
            }
        }
        let mut steps: Vec<_> = [PORT_BEGIN, PORT_LOOP].repeat(TRIALS).into_iter().map(out).collect();
        steps.push(stopped());
        let found = judge(&mut Slow(Fake(steps))).unwrap();
        let [Finding::Software { mips: 1..=3, unknown: Some("POPCNT") }] = found[..] else {
            panic!("{found:?}")
        };
        let text = found[0].to_string();
        assert!(text.starts_with("software KVM") && text.ends_with("does not know POPCNT"), "{text}");
        let found = judge(&mut Slow(Fake(vec![out(PORT_BEGIN), Ok(Exit::Interrupted)]))).unwrap();
        assert!(matches!(found[..], [Finding::Software { unknown: None, .. }]));
    }

    #[test]
    fn this_host_gets_an_answer_in_time() {
        let begin = Instant::now();
        let found = probe();
        let took = begin.elapsed();
        eprintln!("{found} ({took:?})");
        for finding in &found.findings {
            eprintln!("  {}", finding.remedy());
        }
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(found.usable() || !found.to_string().starts_with("KVM works"));
    }
}
