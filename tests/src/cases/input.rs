//! Input devices: what they are, their events, and lights the other way.
//!
//! The guest's half reads its `/dev/input/event0` with the code that reads the host's devices when those are passed
//! on.

use std::ffi::OsString;
use std::fs::File;
use std::time::{Duration, Instant};

use krun::{AxisInfo, DeviceIds, Input, InputConfig, InputEvent};

use crate::harness::{Captured, Case, Env, Failure, no_guest, same, start};
use crate::uinput::Uinput;

pub const CASE: Case = Case { name: "input", host, guest };
/// A device of the host.
pub const EVDEV: Case = Case { name: "input_evdev", host: evdev, guest: no_guest };

const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const EV_ABS: u16 = 3;
const EV_LED: u16 = 0x11;
const EV_REP: u8 = 0x14;

fn event(kind: u16, code: u16, value: u32) -> InputEvent {
    InputEvent { kind, code, value }
}

fn config() -> InputConfig {
    let axis = |max| AxisInfo { min: (-100i32) as u32, max, fuzz: 1, flat: 2, resolution: 3 };
    InputConfig {
        serial: b"0042".to_vec(),
        ids: DeviceIds { bus: 6, vendor: 0x1234, product: 0x5678, version: 9 },
        properties: vec![2],
        ..InputConfig::new("krun test device")
    }
    .with(EV_KEY as u8, [1, 30, 272])
    .with(EV_LED as u8, [0, 1])
    .with_axis(0, axis(1000))
    .with_axis(1, axis(2000))
}

/// Keys and positions, in groups and steps that evdev passes on as they are.
fn events() -> Vec<InputEvent> {
    (0..200u32)
        .flat_map(|n| {
            let down = u32::from(n % 2 == 0);
            [
                event(EV_KEY, 30, down),
                event(EV_ABS, 0, 10 * n + 10),
                event(EV_ABS, 1, u32::MAX - 20 * (n % 2 + 1)),
                event(EV_SYN, 0, 0),
            ]
        })
        .collect()
}

/// Events that are sent before the guest has taken them: it has room for so many.
const GROUP: usize = 40;

/// With an argument: for a device without a serial number.
fn guest(args: &[OsString]) -> Result<u8, String> {
    let file = match File::options().read(true).write(true).open("/dev/input/event0") {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(77),
        Err(e) => return Err(e.to_string()),
    };
    let copy = file.try_clone().map_err(|e| e.to_string())?;
    let (mut seen, mut device) = Input::evdev(copy.into()).map_err(|e| e.to_string())?.into_parts();
    // Bits past those of the driver are the kernel's affair, and so is its own auto-repeat.
    seen.events.remove(&EV_REP);
    seen.events.values_mut().chain([&mut seen.properties]).for_each(|bits| {
        bits.truncate(bits.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1));
    });
    let mut wanted = config();
    if args.iter().any(|word| !word.is_empty()) {
        wanted.serial.clear();
    }
    wanted.events.retain(|_, bits| !bits.is_empty());
    if seen != wanted {
        return Err(format!("seen {seen:?}, wanted {wanted:?}"));
    }
    println!("ready");
    let mut got = Vec::new();
    let start = Instant::now();
    while got.len() < events().len() {
        match device.next().map_err(|e| e.to_string())? {
            Some(event) => {
                got.push(event);
                if got.len() % GROUP == 0 {
                    println!("got {}.", got.len());
                }
            }
            None if start.elapsed() > Duration::from_secs(60) => {
                return Err(format!("only {} events came", got.len()));
            }
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    if got != events() {
        return Err(format!("events {got:?}"));
    }
    device.send(event(EV_LED, 1, 1));
    device.send(event(EV_SYN, 0, 0));
    println!("sent");
    std::thread::sleep(Duration::from_millis(500));
    Ok(0)
}

fn host(env: &Env) -> Result<(), Failure> {
    let (device, sender) = Input::queue(config())?;
    let Some(captured) = started(env, device, "")? else { return Err(Failure::Skip(NO_DRIVER.into())) };
    send(&captured, |group| Ok(sender.send(group)?))?;
    // What is wrong, if anything, is on the guest's standard error.
    let sent = captured.wait_for_output("sent");
    captured.finish()?.success()?;
    sent?;
    let light = std::iter::from_fn(|| sender.receive()).find(|e| e.kind == EV_LED && e.value == 1);
    same("the light that the guest switched on", light, Some(event(EV_LED, 1, 1)))
}

const NO_DRIVER: &str = "this kernel has no evdev or no virtio-input driver";

/// A guest that is ready for events; `None` when it has no driver.
fn started(env: &Env, device: Input, word: &str) -> Result<Option<Captured>, Failure> {
    let mut vm = env.guest_half("input", [word]);
    vm.inputs.push(device);
    let captured = start(vm)?;
    if captured.wait_for_output("ready").is_err() {
        let output = captured.finish()?;
        return match output.code {
            77 => Ok(None),
            _ => output.success().map(|_| None),
        };
    }
    Ok(Some(captured))
}

/// All events, as fast as the guest takes them.
fn send(captured: &Captured, send: impl Fn(&[InputEvent]) -> Result<(), Failure>) -> Result<(), Failure> {
    for (n, group) in events().chunks(GROUP).enumerate() {
        send(group)?;
        if captured.wait_for_output(&format!("got {}.", (n + 1) * GROUP)).is_err() {
            // Why is on the guest's standard error.
            break;
        }
    }
    Ok(())
}

fn evdev(env: &Env) -> Result<(), Failure> {
    let uinput = Uinput::new(env, &config())?;
    let file = File::options().read(true).write(true).open(&uinput.event)?;
    let Some(captured) = started(env, Input::evdev(file.into())?, "evdev")? else {
        return Err(Failure::Skip(NO_DRIVER.into()));
    };
    send(&captured, |group| uinput.send(group))?;
    let sent = captured.wait_for_output("sent");
    captured.finish()?.success()?;
    sent?;
    let mut light = None;
    while let Some(event) = uinput.receive()? {
        light = light.or(Some(event).filter(|e| e.kind == EV_LED && e.value == 1));
    }
    same("the light that the guest switched on", light, Some(event(EV_LED, 1, 1)))?;
    // The host holds the event of the light back from others until a report ends, which it did not.
    uinput.send(&[event(EV_SYN, 0, 0)])?;
    super::c_abi::input_device(env, &uinput)
}
