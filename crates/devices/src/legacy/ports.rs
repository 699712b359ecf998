//! I/O ports that a kernel touches on its way up and down.

use super::Serial;

/// First port of the serial port.
const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = SERIAL + 7;
/// Status and command register of the keyboard controller.
const I8042_COMMAND: u16 = 0x64;
/// Pulses the processor's reset line.
const I8042_RESET: u8 = 0xfe;
/// Status that lets both of its users go on at once: a driver that looks for the controller gives up, as
/// the output buffer stays full however often it is read; a kernel that wants to reset does not wait, as
/// the input buffer is empty.
const I8042_STATUS: u8 = 0x01;
/// Timer 2 gate and speaker; bit 5 is the timer's output, which loops that calibrate wait for.
const SPEAKER: u16 = 0x61;
/// Data of the clock and its memory. 0 is "no update in progress"; all ones would make a driver wait for
/// seconds.
const RTC_DATA: u16 = 0x71;
/// Reset control of chipsets since the PIIX; bit 2 starts what bit 1 chose.
const RESET_CONTROL: u16 = 0xcf9;

/// What a port access asks of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Nothing.
    None,
    /// To restart.
    Reset,
}

/// The ports. Accesses come from all vCPU threads.
#[derive(Debug, Default)]
pub struct Ports {
    serial: Option<Serial>,
}

impl Ports {
    /// Ports with or without a serial port at 0x3f8.
    pub fn new(serial: Option<Serial>) -> Self {
        Self { serial }
    }

    /// The serial port.
    pub fn serial(&self) -> Option<&Serial> {
        self.serial.as_ref()
    }

    /// The guest reads one port of 8 bits. What is not there reads as all ones.
    fn read_byte(&self, port: u16) -> u8 {
        match (port, &self.serial) {
            (SERIAL..=SERIAL_END, Some(serial)) => serial.read(port - SERIAL),
            (I8042_COMMAND, _) => I8042_STATUS,
            (SPEAKER, _) => 0x20,
            (RTC_DATA | RESET_CONTROL, _) => 0,
            _ => 0xff,
        }
    }

    /// The guest reads `data.len()` bytes at `port`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        for (n, byte) in (0u16..).zip(data) {
            *byte = self.read_byte(port.wrapping_add(n));
        }
    }

    /// The guest writes `data` at `port`. What is not there ignores it.
    pub fn write(&self, port: u16, data: &[u8]) -> Request {
        match (port, data, &self.serial) {
            (SERIAL..=SERIAL_END, _, Some(serial)) => {
                for (byte, port) in data.iter().zip(port..=SERIAL_END) {
                    serial.write(port - SERIAL, *byte);
                }
                Request::None
            }
            (I8042_COMMAND, [I8042_RESET], _) => Request::Reset,
            (RESET_CONTROL, [value], _) if value & 0b100 != 0 => Request::Reset,
            _ => Request::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(port: u16) -> u8 {
        let mut data = [0x55];
        Ports::default().read(port, &mut data);
        data[0]
    }

    #[test]
    fn ports_that_are_not_there_read_all_ones_in_any_width() {
        let mut data = [0; 4];
        Ports::default().read(0x2f8, &mut data);
        assert_eq!(data, [0xff; 4]);
        data = [0; 4];
        // Past the last port the numbers start again.
        Ports::default().read(0xffff, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn nobody_waits_for_clock_or_keyboard() {
        assert_eq!(read(0x71), 0);
        assert_eq!(read(0x64) & 0b11, 0b01);
        assert_eq!(read(0x61) & 0x20, 0x20);
    }

    #[test]
    fn both_ways_of_resetting_are_heard() {
        let p = Ports::default();
        assert_eq!(p.write(0x64, &[0xfe]), Request::Reset);
        assert_eq!(p.write(0xcf9, &[0x0e]), Request::Reset);
        assert_eq!(p.write(0xcf9, &[0x02]), Request::None);
        assert_eq!(p.write(0x64, &[0xaa]), Request::None);
        assert_eq!(p.write(0x64, &[0xfe, 0]), Request::None);
        assert_eq!(p.write(0x3f8, b"x"), Request::None);
    }
}
