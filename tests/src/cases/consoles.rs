//! Consoles besides that of the workload: kernel's messages in a file, the serial port, ports by name.

use std::io::{BufRead, BufReader, Read, Write, pipe};
use std::thread::{self, JoinHandle};

use krun::{Console, Port, Serial, Vm};

use super::terminal::Pty;
use crate::harness::{Case, Env, Failure, TempDir, contains, no_guest, run, same};

pub const LOG: Case = Case { name: "console_log", host: log, guest: no_guest };
pub const SERIAL: Case = Case { name: "serial", host: serial, guest: no_guest };
pub const SEVERAL: Case = Case { name: "consoles", host: several, guest: no_guest };
pub const ORDER: Case = Case { name: "consoles_order", host: order, guest: no_guest };

/// Status of a script that misses something.
const MISSING: i32 = 77;

/// `--console-log` has the kernel's messages, and the streams have nothing of them.
fn log(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("log")?;
    let path = dir.path().join("log");
    let mut command = env.krun()?;
    command.arg("--console-log").arg(&path).args(["--", "sh", "-c", "echo out; echo err >&2; exit 3"]);
    let output = command.output()?;
    same("status", output.status.code(), Some(3))?;
    same("standard output", output.stdout.as_slice(), b"out\n")?;
    same("standard error", output.stderr.as_slice(), b"err\n")?;
    let text = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
    contains("log", &text, "Run /init.krun as init process")
}

/// Reads until the end, beside what else is done.
fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<std::io::Result<String>> {
    thread::spawn(move || {
        let mut text = String::new();
        from.read_to_string(&mut text).map(|_| text)
    })
}

fn collected(reader: JoinHandle<std::io::Result<String>>) -> Result<String, Failure> {
    Ok(reader.join().map_err(|_| Failure::Wrong("a reader panicked".into()))??)
}

/// Both directions of `ttyS0`, and the kernel's messages on it.
fn serial(env: &Env) -> Result<(), Failure> {
    let (input, typed) = pipe()?;
    let (shown, output) = pipe()?;
    let script = format!(
        "if ! grep -q krun@krun /proc/version; then test -w /dev/ttyS0 || exit {MISSING}; fi
        exec 3<>/dev/ttyS0 || exit 1; stty -F /dev/ttyS0 -echo || exit 2
        echo ready >&3; read line <&3; echo \"got $line\" >&3"
    );
    let mut config = env.shell(&script);
    config.serial = Some(Serial { input: Some(input.into()), output: Some(output.into()) });
    config.kernel_console = Some("ttyS0".into());
    config.verbose = true;
    // What is typed before the port is opened is lost, as on any such port.
    let reader = thread::spawn(move || {
        let (mut shown, mut typed) = (BufReader::new(shown), Some(typed));
        let (mut text, mut line) = (String::new(), Vec::new());
        while shown.read_until(b'\n', &mut line)? > 0 {
            let said = String::from_utf8_lossy(&line);
            if said.starts_with("ready")
                && let Some(mut typed) = typed.take()
            {
                typed.write_all(b"hello\n")?;
            }
            text.push_str(&said);
            line.clear();
        }
        Ok(text)
    });
    let status = run(config)?.code;
    let text = collected(reader)?;
    if status == MISSING {
        return Err(Failure::Skip("this kernel has no driver for serial ports".into()));
    }
    same(&format!("status; the port said {text:?}"), status, 0)?;
    contains("serial port", &text, "got hello")?;
    contains("serial port", &text, "Linux version")
}

/// A second console device with a port by name.
fn several(env: &Env) -> Result<(), Failure> {
    let (input, mut given) = pipe()?;
    let (taken, output) = pipe()?;
    given.write_all(b"hello\n")?;
    let script = "set -e
        for port in /sys/class/virtio-ports/*; do
            if [ \"$(cat $port/name 2>/dev/null)\" = data ]; then dev=/dev/${port##*/}; fi
        done
        exec 3<>$dev
        read line <&3; echo \"got $line\" >&3
        echo out";
    let mut config = env.shell(script);
    config.consoles = vec![Console::Ports(vec![Port::Stream {
        name: "data".into(),
        input: Some(input.into()),
        output: Some(output.into()),
    }])];
    let taken = collect(taken);
    let output = run(config)?.success()?;
    same("standard output", output.out().as_str(), "out\n")?;
    same("port", collected(taken)?.as_str(), "got hello\n")
}

/// Terminals of several devices have the numbers of their order, in every boot. Each is known by its size.
fn order(env: &Env) -> Result<(), Failure> {
    /// `hvc0` is beside the standard streams; there are eight numbers with device files.
    const TERMINALS: u16 = 7;
    const BOOTS: usize = 3;
    let script = "for n in 1 2 3 4 5 6 7; do
            until size=$(stty size 2>/dev/null </dev/hvc$n) && test \"$size\" != '0 0'; do sleep 0.02; done
            echo $size
        done";
    let terminals = (1..=TERMINALS).map(|_| Pty::open()).collect::<Result<Vec<_>, _>>()?;
    for (n, pty) in (1..).zip(&terminals) {
        pty.resize(100 + n, 10 + n)?;
    }
    let wanted: String = (1..=TERMINALS).map(|n| format!("{} {}\n", 10 + n, 100 + n)).collect();
    for boot in 0..BOOTS {
        let mut config = env.shell(script);
        config.vcpus = 2;
        for pty in &terminals {
            let port = Port::Terminal { name: String::new(), tty: pty.slave.try_clone()? };
            config.consoles.push(Console::Ports(vec![port]));
        }
        let output = run(config)?.success()?;
        same(&format!("sizes in boot {boot}"), output.out().as_str(), wanted.as_str())?;
    }
    second(env)
}

/// The workload's terminal need not be the first.
fn second(env: &Env) -> Result<(), Failure> {
    let (other, mut own) = (Pty::open()?, Pty::open()?);
    let mut config = env.shell("tty; exit 3");
    let port = Port::Terminal { name: String::new(), tty: other.slave.try_clone()? };
    config.consoles = vec![Console::Ports(vec![port]), own.console()?];
    let status = Vm::start(config)?.wait().map_err(|e| e.to_string())?;
    let mut said = [0; 100];
    let len = own.master.read(&mut said)?;
    let said = String::from_utf8_lossy(&said[..len]).into_owned();
    same("the workload's terminal", (said.trim_end(), status.code()), ("/dev/hvc1", 3))
}
