//! QEMU's monitor: one request, one answer (docs/interop/qmp-spec of QEMU).

use std::fmt::Display;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Error;

/// Longest time that anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A session with the monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

fn lost(what: impl Display) -> Error {
    Error::Qemu { what: format!("the monitor: {what}"), log: String::new() }
}

impl Qmp {
    /// Takes the greeting and enters command mode.
    pub fn new(stream: UnixStream) -> Result<Self, Error> {
        stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
        let writer = stream.try_clone().map_err(lost)?;
        let mut qmp = Self { reader: BufReader::new(stream), writer };
        qmp.line()?;
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value, Error> {
        let mut text = String::new();
        match self.reader.read_line(&mut text) {
            Ok(0) => Err(lost("QEMU ended")),
            Ok(_) => serde_json::from_str(&text).map_err(lost),
            Err(e) => Err(lost(e)),
        }
    }

    /// Sends a command and waits for its answer; events in between are passed over.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        self.writer.write_all(text.as_bytes()).map_err(lost)?;
        loop {
            let answer = self.line()?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(lost(format!("{command}: {}", error["desc"].as_str().unwrap_or_default())));
            }
        }
    }

    /// Waits until the migration that was started has completed.
    pub fn migrated(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let answer = self.call("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => return Err(lost(format!("saving failed: {answer}"))),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        Err(lost("saving does not end"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_events_and_errors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = std::thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut asked = Vec::new();
            let answers = [
                "{\"return\": {}}\n",
                "{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"active\"}}\n",
                "{\"return\": {\"status\": \"completed\"}}\n",
                "{\"error\": {\"desc\": \"no such thing\"}}\n",
            ];
            (&theirs).write_all(b"{\"QMP\": {}}\n").unwrap();
            for answer in answers {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                asked.push(serde_json::from_str::<Value>(&line).unwrap()["execute"].clone());
                (&theirs).write_all(answer.as_bytes()).unwrap();
            }
            asked
        });
        let mut qmp = Qmp::new(ours).unwrap();
        qmp.migrated().unwrap();
        let error = qmp.call("fly", json!({})).unwrap_err().to_string();
        assert!(error.contains("fly: no such thing"), "{error}");
        assert_eq!(qemu.join().unwrap(), ["qmp_capabilities", "query-migrate", "query-migrate", "fly"]);
        assert!(qmp.call("stop", json!({})).is_err());
    }
}
