//! Initial RAM disks: the `newc` format (the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

/// An archive that grows by files and ends as bytes.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    /// Adds a directory; its parents come first. Paths have no leading slash.
    #[must_use]
    pub fn directory(self, path: &[u8], mode: u32) -> Self {
        self.entry(path, DIRECTORY | mode, (0, 0), &[])
    }

    /// Adds a file, of less than 4 GiB.
    #[must_use]
    pub fn file(self, path: &[u8], mode: u32, data: &[u8]) -> Self {
        self.entry(path, REGULAR | mode, (0, 0), data)
    }

    /// Adds a character device.
    #[must_use]
    pub fn device(self, path: &[u8], mode: u32, major: u32, minor: u32) -> Self {
        self.entry(path, CHARACTER | mode, (major, minor), &[])
    }

    /// The archive.
    pub fn finish(self) -> Vec<u8> {
        self.entry(b"TRAILER!!!", 0, (0, 0), &[]).bytes
    }

    fn entry(mut self, path: &[u8], mode: u32, device: (u32, u32), data: &[u8]) -> Self {
        self.inode += 1;
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        // Inode, mode, owner, group, links, time, size, device (major, minor), device number of the file
        // itself (major, minor), length of the name, checksum.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_it() {
        let bytes = Archive::default()
            .directory(b"dev", 0o755)
            .device(b"dev/console", 0o600, 5, 1)
            .file(b"init", 0o755, b"12345")
            .file(b"empty", 0o644, b"")
            .finish();
        let run = |args: &[&str], dir: &std::path::Path| {
            let mut command = Command::new("cpio");
            command.args(args).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
            let Ok(mut child) = command.spawn() else {
                println!("skipped: cpio is not installed");
                return None;
            };
            child.stdin.take().unwrap().write_all(&bytes).unwrap();
            let out = child.wait_with_output().unwrap();
            assert!(out.status.success());
            Some(String::from_utf8(out.stdout).unwrap())
        };
        let dir = tempfile::tempdir().unwrap();
        let Some(text) = run(&["--quiet", "-tv"], dir.path()) else { return };
        let names: Vec<_> = text.lines().map(|l| l.split_whitespace().last().unwrap()).collect();
        assert_eq!(names, ["dev", "dev/console", "init", "empty"]);
        let starts: Vec<_> = text.lines().map(|l| &l[..10]).collect();
        assert_eq!(starts, ["drwxr-xr-x", "crw-------", "-rwxr-xr-x", "-rw-r--r--"]);
        run(&["--quiet", "-i", "init"], dir.path());
        assert_eq!(std::fs::read(dir.path().join("init")).unwrap(), b"12345");
    }
}
