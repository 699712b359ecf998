//! Tables that name the machine and carry strings of the caller's to the guest (SMBIOS 3.0, DMTF DSP0134). A
//! Linux guest shows them in `/sys/firmware/dmi` and to `dmidecode`; cloud images look for their settings there.

/// Where a kernel looks for the entry point: at each 16th byte of the last 64 KiB below 1 MiB (section 5.2.2).
pub const AT: u64 = 0xf_0000;
/// End of that range.
pub const END: u64 = 0x10_0000;
/// The tables follow the entry point.
const TABLE_AT: u64 = AT + 0x20;
/// Bytes of the entry point.
const ENTRY: usize = 0x18;

/// Most strings: their number is a byte.
pub const MAX_STRINGS: usize = 255;
/// Most bytes of all strings, each with its end: room is left for the other tables.
pub const MAX_BYTES: usize = (END - TABLE_AT) as usize - 1024;

/// Structure types of section 7.
const FIRMWARE: u8 = 0;
const SYSTEM: u8 = 1;
const OEM_STRINGS: u8 = 11;
const END_OF_TABLE: u8 = 127;

/// Why strings cannot be passed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OemStringError {
    /// The end of a string is a NUL byte, and an empty one is the end of the list.
    #[error("OEM string {index}: it is empty or has a NUL byte in it, which SMBIOS has no way to store")]
    Content {
        /// Which, from 1.
        index: usize,
    },
    /// More than [`MAX_STRINGS`] or [`MAX_BYTES`].
    #[error(
        "{count} OEM strings of {bytes} bytes: at most {MAX_STRINGS} strings of {MAX_BYTES} bytes, ends included"
    )]
    TooMany {
        /// How many.
        count: usize,
        /// Bytes of all, with a NUL each.
        bytes: usize,
    },
}

/// Checks that `strings` can be stored.
///
/// # Errors
/// [`OemStringError`].
pub fn check(strings: &[String]) -> Result<(), OemStringError> {
    if let Some(at) = strings.iter().position(|s| s.is_empty() || s.contains('\0')) {
        return Err(OemStringError::Content { index: at + 1 });
    }
    let (count, bytes) = (strings.len(), strings.iter().map(|s| s.len() + 1).sum());
    if count > MAX_STRINGS || bytes > MAX_BYTES {
        return Err(OemStringError::TooMany { count, bytes });
    }
    Ok(())
}

/// One structure: type, length and handle, its fields, then its strings (section 6.1).
fn structure(table: &mut Vec<u8>, kind: u8, fields: &[u8], strings: &[&str]) {
    // Each type comes once, so it is its own handle too. All fields here are short.
    table.extend([kind, fields.len() as u8 + 4, kind, 0]);
    table.extend(fields);
    for text in strings {
        table.extend(text.as_bytes());
        table.push(0);
    }
    if strings.is_empty() {
        table.push(0);
    }
    table.push(0);
}

/// Type 0 (section 7.1): vendor, version, address segment, date, ROM size, characteristics.
fn firmware(table: &mut Vec<u8>) {
    let mut fields = vec![1, 2, 0, 0, 0, 0];
    // No characteristics are told ...
    fields.extend((1u64 << 3).to_le_bytes());
    // ... but that this is a virtual machine. No release, of the firmware or of an embedded controller.
    fields.extend([0, 1 << 4, 0, 0, 0xff, 0xff]);
    structure(table, FIRMWARE, &fields, &["krun", env!("CARGO_PKG_VERSION")]);
}

/// Type 1 (section 7.2): manufacturer, product, no version or serial number, no UUID, woken by the power switch.
fn system(table: &mut Vec<u8>) {
    let mut fields = vec![1, 2, 0, 0];
    fields.extend([0; 16]);
    fields.extend([6, 0, 0]);
    structure(table, SYSTEM, &fields, &["krun", "microVM"]);
}

/// The entry point (section 5.2.2) for a table of `len` bytes.
fn entry_point(len: usize) -> Vec<u8> {
    let mut e = vec![0u8; ENTRY];
    e[..5].copy_from_slice(b"_SM3_");
    e[6] = ENTRY as u8;
    // Version 3.0, no revision, entry point revision 1.
    e[7..11].copy_from_slice(&[3, 0, 0, 1]);
    // At most 64 KiB.
    e[12..16].copy_from_slice(&(len as u32).to_le_bytes());
    e[16..24].copy_from_slice(&TABLE_AT.to_le_bytes());
    e[5] = e.iter().fold(0, |sum: u8, b| sum.wrapping_sub(*b));
    e
}

/// What lies in memory, and where, for `strings` that passed [`check`]. Nothing if there are none: a kernel that
/// finds nothing here goes on sooner.
pub fn tables(strings: &[String]) -> Vec<(u64, Vec<u8>)> {
    if strings.is_empty() {
        return Vec::new();
    }
    let mut table = Vec::new();
    firmware(&mut table);
    system(&mut table);
    let strings: Vec<_> = strings.iter().map(String::as_str).collect();
    structure(&mut table, OEM_STRINGS, &[strings.len() as u8], &strings);
    structure(&mut table, END_OF_TABLE, &[], &[]);
    vec![(AT, entry_point(table.len())), (TABLE_AT, table)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The structures, by type, with their strings.
    fn parse(mut table: &[u8]) -> Vec<(u8, Vec<String>)> {
        let mut list = Vec::new();
        while !table.is_empty() {
            let (kind, len) = (table[0], usize::from(table[1]));
            let end = len + table[len..].windows(2).position(|w| w == [0, 0]).unwrap();
            let strings = table[len..end].split(|b| *b == 0).filter(|s| !s.is_empty());
            list.push((kind, strings.map(|s| String::from_utf8(s.to_vec()).unwrap()).collect()));
            table = &table[end + 2..];
        }
        list
    }

    #[test]
    fn strings_are_in_the_table_that_the_entry_point_names() {
        let strings = ["io.systemd.credential:a=b".to_owned(), "ü".to_owned()];
        let [(entry_at, entry), (table_at, table)] = &tables(&strings)[..] else { panic!() };
        assert_eq!((*entry_at, entry.len()), (0xf_0000, 24));
        assert_eq!(entry.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        assert_eq!(entry[16..24], table_at.to_le_bytes());
        assert_eq!(entry[12..16], (table.len() as u32).to_le_bytes());
        let parsed = parse(table);
        assert_eq!(parsed.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [0, 1, 11, 127]);
        assert_eq!(parsed[2].1, strings);
        // The lengths of the specification, for version 3.0.
        assert_eq!((table[1], parse(table)[1].1.len()), (0x18, 2));
    }

    #[test]
    fn the_most_that_is_accepted_fits() {
        let long = vec!["x".repeat(MAX_BYTES / 2 - 1); 2];
        check(&long).unwrap();
        let last = tables(&long).pop().unwrap();
        assert!(last.0 + last.1.len() as u64 <= END);
        check(&vec!["x".to_owned(); 255]).unwrap();
        assert!(tables(&[]).is_empty());
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        let bad = |strings: &[&str]| check(&strings.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_eq!(bad(&["a", ""]), Err(OemStringError::Content { index: 2 }));
        assert_eq!(bad(&["a\0b"]), Err(OemStringError::Content { index: 1 }));
        assert_eq!(bad(&["x"; 256]), Err(OemStringError::TooMany { count: 256, bytes: 512 }));
        assert!(matches!(bad(&[&"x".repeat(MAX_BYTES)]), Err(OemStringError::TooMany { count: 1, .. })));
    }
}
