//! How many requests of each kind a guest has made: each costs it a few exits, so their number is what a
//! slow start or a slow build is made of.

use std::fmt;

/// Operation codes that are counted apart; larger ones share the first counter.
const CODES: usize = 56;

/// Requests by operation code.
#[derive(Clone, Copy)]
pub struct Counts([u64; CODES]);

/// Names by operation code, of those that guests use; the others are shown as numbers.
const NAMES: [(u32, &str); 44] = [
    (1, "lookup"),
    (2, "forget"),
    (3, "getattr"),
    (4, "setattr"),
    (5, "readlink"),
    (6, "symlink"),
    (8, "mknod"),
    (9, "mkdir"),
    (10, "unlink"),
    (11, "rmdir"),
    (12, "rename"),
    (13, "link"),
    (14, "open"),
    (15, "read"),
    (16, "write"),
    (17, "statfs"),
    (18, "release"),
    (20, "fsync"),
    (21, "setxattr"),
    (22, "getxattr"),
    (23, "listxattr"),
    (24, "removexattr"),
    (25, "flush"),
    (26, "init"),
    (27, "opendir"),
    (28, "readdir"),
    (29, "releasedir"),
    (30, "fsyncdir"),
    (31, "getlk"),
    (32, "setlk"),
    (33, "setlkw"),
    (34, "access"),
    (35, "create"),
    (36, "interrupt"),
    (38, "destroy"),
    (39, "ioctl"),
    (42, "batch-forget"),
    (43, "fallocate"),
    (44, "readdirplus"),
    (45, "rename2"),
    (46, "lseek"),
    (48, "setupmapping"),
    (49, "removemapping"),
    (52, "statx"),
];

impl Default for Counts {
    fn default() -> Self {
        Self([0; CODES])
    }
}

impl Counts {
    /// Counts one request.
    pub fn add(&mut self, opcode: u32) {
        let index = usize::try_from(opcode).ok().filter(|i| *i < CODES).unwrap_or(0);
        self.0[index] += 1;
    }

    /// All requests.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} requests:", self.total())?;
        for (code, n) in (0u32..).zip(self.0).filter(|(_, n)| *n > 0) {
            match NAMES.iter().find(|(c, _)| *c == code) {
                Some((_, name)) => write!(f, " {name} {n}")?,
                None => write!(f, " op{code} {n}")?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_and_shown() {
        let mut counts = Counts::default();
        for code in [1, 1, 15, 47, u32::MAX] {
            counts.add(code);
        }
        assert_eq!(counts.to_string(), "5 requests: op0 1 lookup 2 read 1 op47 1");
    }
}
