//! Programs of a few bytes in place of a kernel: what a kernel finds when it starts, and what is told of one that
//! does itself in.

use std::ffi::OsString;
use std::io::{Read, pipe};
use std::path::Path;
use std::process::Command;
use std::thread;

use krun::{Error, Kernel, KernelFormat, Outcome, Serial, Vm, VmConfig};

use crate::harness::{Case, Env, Failure, TempDir, contains, no_guest, run as run_guest, same};

pub const CASE: Case = Case { name: "bare", host, guest: no_guest };
/// SMBIOS tables as Linux finds them.
pub const SMBIOS_IN_LINUX: Case = Case { name: "smbios", host: tables, guest: no_guest };

/// Where the program lies, and is entered in 64-bit mode.
const AT: u64 = 16 << 20;
/// Where a kernel looks for SMBIOS tables.
const SMBIOS: u32 = 0xf_0000;
/// Bytes of it that are looked at.
const SMBIOS_LEN: u32 = 512;

/// An ELF executable with nothing but `code` (System V ABI, chapter 4).
fn elf(code: &[u8]) -> Vec<u8> {
    let (header, program_header) = (64u64, 56u64);
    let start = header + program_header;
    let mut e = vec![0u8; start as usize];
    e[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    // An executable, x86-64, version 1.
    e[16..24].copy_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    e[24..32].copy_from_slice(&AT.to_le_bytes());
    e[32..40].copy_from_slice(&header.to_le_bytes());
    e[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    let load =
        |e: &mut [u8], at: usize, value: u64| e[64 + at..72 + at].copy_from_slice(&value.to_le_bytes());
    // PT_LOAD, all permissions.
    load(&mut e, 0, 7 << 32 | 1);
    for (at, value) in [(8, start), (16, AT), (24, AT), (32, code.len() as u64), (40, code.len() as u64)] {
        load(&mut e, at, value);
    }
    e.extend(code);
    e
}

/// Loads an empty table of exception handlers, then causes an exception: `lidt [rip + 2]; ud2; 10 zeroes`.
const TRIPLE_FAULT: [u8; 19] = [0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Writes memory to the serial port, byte by byte.
pub(super) fn write_out(from: u32, len: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    code.push(0xbe); // mov esi, from
    code.extend(from.to_le_bytes());
    code.push(0xb9); // mov ecx, len
    code.extend(len.to_le_bytes());
    code.extend([0xac, 0xee, 0xe2, 0xfc]); // again: lodsb; out dx, al; loop again
    code.extend(TRIPLE_FAULT);
    code
}

/// Runs a program to its triple fault; gives back what it wrote to the serial port.
pub(super) fn run(dir: &Path, code: &[u8], change: impl FnOnce(&mut VmConfig)) -> Result<Vec<u8>, Failure> {
    let path = dir.join("program");
    std::fs::write(&path, elf(code))?;
    let (mut reader, writer) = pipe()?;
    let mut config = VmConfig {
        memory_mib: 64,
        kernel: Kernel::File { path, format: KernelFormat::Elf, initramfs: None, cmdline: None },
        serial: Some(Serial { input: None, output: Some(writer.into()) }),
        ..VmConfig::default()
    };
    change(&mut config);
    let vm = Vm::start(config)?;
    let written = thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map(|_| bytes)
    });
    let end = vm.wait();
    drop(vm);
    match end {
        Err(e) if matches!(&*e, Error::Ended { outcome: Outcome::TripleFault, .. }) => {}
        other => return Err(Failure::Wrong(format!("a triple fault was told as {other:?}"))),
    }
    written.join().map_err(|_| Failure::Wrong("the reader panicked".into()))?.map_err(Failure::from)
}

/// The tables as a file of `dmidecode --dump-bin`: the entry point, and from byte 32 the table, at which it points.
fn dump(memory: &[u8]) -> Vec<u8> {
    let mut dump = memory.to_vec();
    dump[16..24].copy_from_slice(&32u64.to_le_bytes());
    dump[5] = 0;
    dump[5] = dump[..24].iter().fold(0, |sum: u8, b| sum.wrapping_sub(*b));
    dump
}

fn smbios(dir: &Path) -> Result<(), Failure> {
    let code = write_out(SMBIOS, SMBIOS_LEN);
    let none = run(dir, &code, |_| {})?;
    same("memory without tables", none, vec![0; SMBIOS_LEN as usize])?;
    let strings = ["io.systemd.credential:motd=hello", "second: 2"].map(OsString::from);
    let memory = run(dir, &code, |config| {
        config.oem_strings = strings.iter().map(|s| s.to_string_lossy().into_owned()).collect();
    })?;
    same("entry point", memory.get(..5), Some(b"_SM3_".as_slice()))?;
    let file = dir.join("dmi");
    std::fs::write(&file, dump(&memory))?;
    let dmidecode = match Command::new("dmidecode").arg("--from-dump").arg(&file).output() {
        Ok(output) => output,
        Err(e) => {
            return Err(Failure::Skip(format!("dmidecode: {e}; all but its view of the tables was checked")));
        }
    };
    let text = String::from_utf8_lossy(&dmidecode.stdout).into_owned();
    for part in [
        "SMBIOS 3.0.0 present",
        "Manufacturer: krun",
        "String 1: io.systemd.credential:motd=hello",
        "String 2: second: 2",
        "End Of Table",
    ] {
        contains("dmidecode", &text, part)?;
    }
    same("complaints of dmidecode", text.contains("Wrong") || text.contains("broken"), false)
}

fn host(_: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("bare")?;
    same("output of a triple fault", run(dir.path(), &TRIPLE_FAULT, |_| {})?, Vec::new())?;
    smbios(dir.path())
}

/// A Linux guest finds the tables and their strings.
fn tables(env: &Env) -> Result<(), Failure> {
    let script = "test -d /sys/firmware/dmi || exit 9; cat /sys/firmware/dmi/tables/DMI";
    let mut config = env.shell(script);
    config.oem_strings = vec!["io.systemd.credential:motd=hello".into()];
    let output = run_guest(config)?;
    if output.code == 9 {
        return Err(Failure::Skip("this guest's kernel reads no SMBIOS tables (CONFIG_DMI)".into()));
    }
    let output = output.success()?;
    contains("the guest's tables", &output.out(), "io.systemd.credential:motd=hello")
}
