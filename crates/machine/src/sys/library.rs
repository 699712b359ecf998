//! Loading a kernel library, and the file behind its pages.
#![allow(unsafe_code)]

use std::ffi::{OsStr, c_char, c_int};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// `krunfw_get_kernel`: the image, and through its arguments load address, entry and size.
type GetKernel = unsafe extern "C" fn(*mut usize, *mut usize, *mut usize) -> *const c_char;
/// `krunfw_get_version`: the version of this interface.
type GetVersion = unsafe extern "C" fn() -> c_int;

/// Bytes of a program header in a 64-bit file (System V ABI, chapter 5).
const PROGRAM_HEADER: usize = 56;
/// Type of a program header: to be mapped.
const PT_LOAD: u64 = 1;

/// What a kernel library says.
#[derive(Debug, Clone, Copy)]
pub struct RawBundle {
    /// Version of the interface.
    pub version: i32,
    /// Guest physical address of the image.
    pub load: u64,
    /// Guest physical address of its first instruction.
    pub entry: u64,
    /// Bytes.
    pub size: u64,
    bytes: &'static [u8],
}

impl RawBundle {
    /// The image; empty when the library has none.
    pub fn bytes(&self) -> &'static [u8] {
        self.bytes
    }
}

/// Why a library cannot be had.
#[derive(Debug)]
pub enum OpenError {
    /// There is none of that name.
    Missing,
    /// What the loader says.
    Other(String),
}

/// Loads the library that the dynamic linker finds under `name`.
pub fn open_by_name(name: &str) -> Result<RawBundle, OpenError> {
    load(OsStr::new(name)).map_err(|e| {
        // "libx.so: cannot open shared object file: No such file or directory" is glibc's answer when its
        // search ends; a library of that name that is damaged gives another text.
        let missing = e.contains("No such file") && e.starts_with(&format!("{name}:"));
        if missing { OpenError::Missing } else { OpenError::Other(e) }
    })
}

/// Loads the library at the absolute `path`.
pub fn open(path: &Path) -> Result<RawBundle, OpenError> {
    if !path.exists() {
        return Err(OpenError::Missing);
    }
    if let Some(end) = missing_end(path) {
        return Err(OpenError::Other(end));
    }
    load(path.as_os_str()).map_err(|e| {
        // The loader begins with the name that our caller tells anyway.
        let name = format!("{}: ", path.display());
        OpenError::Other(e.strip_prefix(&name).map_or_else(|| e.clone(), ToOwned::to_owned))
    })
}

/// What is wrong with a library whose file ends before what it wants to have mapped. The loader maps it all the
/// same, and whoever touches a page past the end of the file gets SIGBUS. Anything else is for the loader to judge.
fn missing_end(path: &Path) -> Option<String> {
    let file = open_regular(path)?;
    let have = file.metadata().ok()?.len();
    let mut header = [0u8; 64];
    if file.read_exact_at(&mut header, 0).is_err() {
        return Some(format!("the file has only {have} bytes; was it not fetched to the end?"));
    }
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    if header[..6] != *b"\x7fELF\x02\x01" || number(&header[54..56]) != PROGRAM_HEADER as u64 {
        return None;
    }
    let table = number(&header[32..40]);
    let mut need = 0;
    for n in 0..number(&header[56..58]) {
        let mut entry = [0u8; PROGRAM_HEADER];
        let at = n.saturating_mul(PROGRAM_HEADER as u64).saturating_add(table);
        need = need.max(at.saturating_add(PROGRAM_HEADER as u64));
        if file.read_exact_at(&mut entry, at).is_err() {
            break;
        }
        if number(&entry[..4]) == PT_LOAD {
            need = need.max(number(&entry[8..16]).saturating_add(number(&entry[32..40])));
        }
    }
    (need > have).then(|| format!("the file ends at {have} of {need} bytes; was it not fetched to the end?"))
}

/// Opens a file, and nothing whose opening could wait.
fn open_regular(path: &Path) -> Option<File> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
    file.metadata().ok()?.is_file().then_some(file)
}

fn load(name: &OsStr) -> Result<RawBundle, String> {
    let text = |e: libloading::Error| {
        use std::error::Error;
        // The outer error does not say what dlopen said.
        e.source().map_or_else(|| e.to_string(), ToString::to_string)
    };
    // SAFETY: loading runs the library's constructors. The user chose this library, or the system's
    // administrator installed it; a kernel library has none.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) }.map_err(text)?;
    // SAFETY: this is the function's type in every library of that name.
    let get_version = unsafe { library.get::<GetVersion>(b"krunfw_get_version\0") }.map_err(text)?;
    // SAFETY: likewise.
    let get_kernel = unsafe { library.get::<GetKernel>(b"krunfw_get_kernel\0") }.map_err(text)?;
    // SAFETY: it takes nothing and returns a constant.
    let version = unsafe { get_version() };
    let (mut load, mut entry, mut size) = (0usize, 0usize, 0usize);
    // SAFETY: the three pointers are valid for writing a size_t each.
    let at = unsafe { get_kernel(&raw mut load, &raw mut entry, &raw mut size) };
    // Guests run from its pages, so it is never unloaded. Loading it again only counts.
    std::mem::forget(library);
    let usable = !at.is_null() && size > 0 && size <= isize::MAX as usize && mapped(at as usize, size);
    // SAFETY: the range was just seen to be mapped and readable, belongs to a library that is never
    // unloaded, and is a constant by the library's contract.
    let bytes = if usable { unsafe { std::slice::from_raw_parts(at.cast(), size) } } else { &[] };
    Ok(RawBundle { version, load: load as u64, entry: entry as u64, size: size as u64, bytes })
}

/// A line of `/proc/self/maps` (proc_pid_maps(5)).
struct Map {
    start: usize,
    end: usize,
    readable: bool,
    offset: u64,
    device: (u32, u32),
    inode: u64,
    path: PathBuf,
}

fn parse_map(line: &[u8]) -> Option<Map> {
    let mut fields = line.splitn(6, |b| *b == b' ');
    let mut text = || fields.next().and_then(|f| std::str::from_utf8(f).ok());
    let (start, end) = text()?.split_once('-')?;
    let permissions = text()?;
    let offset = u64::from_str_radix(text()?, 16).ok()?;
    let (major, minor) = text()?.split_once(':')?;
    let inode = text()?.parse().ok()?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let path = fields.next().unwrap_or_default().trim_ascii();
    Some(Map {
        start: usize::from_str_radix(start, 16).ok()?,
        end: usize::from_str_radix(end, 16).ok()?,
        readable: permissions.starts_with('r'),
        offset,
        device,
        inode,
        path: OsStr::from_bytes(path).into(),
    })
}

fn maps() -> impl Iterator<Item = Map> {
    let lines = File::open("/proc/self/maps").map(BufReader::new).into_iter();
    lines.flat_map(|f| f.split(b'\n')).map_while(Result::ok).filter_map(|line| parse_map(&line))
}

/// Whether all of a range is readable.
fn mapped(at: usize, len: usize) -> bool {
    let Some(end) = at.checked_add(len) else { return false };
    let mut next = at;
    for map in maps() {
        if map.start <= next && next < map.end && map.readable {
            next = map.end;
        }
    }
    next >= end
}

/// The mapping that holds `address`, if any.
fn map_of(address: usize) -> Option<Map> {
    maps().find(|m| m.start <= address && address < m.end)
}

/// The file that holds the code at `address`.
pub fn path_of(address: usize) -> Option<PathBuf> {
    map_of(address).map(|m| m.path).filter(|p| p.is_absolute())
}

/// The library or program that this code is part of.
pub fn own_path() -> Option<PathBuf> {
    path_of(own_path as *const () as usize)
}

/// The file that `bytes` were mapped from, the offset of their first one and the file's length. `None`
/// when they come from several mappings or from none, or when the path leads to another file by now.
pub fn file_behind(bytes: &[u8]) -> Option<(File, u64, u64)> {
    let at = bytes.as_ptr() as usize;
    let map = map_of(at)?;
    if map.inode == 0 || !at.is_multiple_of(4096) || map.end - at < bytes.len() {
        return None;
    }
    let same = |file: &File| {
        let meta = file.metadata().ok()?;
        let device = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
        // Some file systems show another device number there than in stat; the inode and the contents
        // decide then.
        (meta.ino() == map.inode && (device == map.device || same_contents(file, &map, bytes)))
            .then_some(meta.len())
    };
    // The second path needs a privilege and leads to the mapping's own file even when the first is
    // outside of this process's root by now.
    let range = format!("/proc/self/map_files/{:x}-{:x}", map.start, map.end);
    for path in [map.path.as_path(), Path::new(&range)] {
        let Some(file) = open_regular(path) else { continue };
        if let Some(len) = same(&file) {
            return Some((file, map.offset + (at - map.start) as u64, len));
        }
    }
    None
}

/// Compares a few pages: enough to tell one kernel build from another.
fn same_contents(file: &File, map: &Map, bytes: &[u8]) -> bool {
    let start = map.offset + (bytes.as_ptr() as usize - map.start) as u64;
    let mut page = [0u8; 4096];
    bytes.chunks_exact(4096).enumerate().step_by(64).all(|(n, expected)| {
        file.read_exact_at(&mut page, start + n as u64 * 4096).is_ok() && page == *expected
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_s_own_file_is_found() {
        assert_eq!(own_path(), std::env::current_exe().ok());
    }

    #[test]
    fn constants_are_found_in_this_program_s_file_and_the_heap_is_not() {
        static MARK: [u8; 3 * 4096] = [0x5a; 3 * 4096];
        let start = MARK.as_ptr().align_offset(4096);
        let page = &MARK[start..start + 4096];
        let (file, offset, len) = file_behind(page).unwrap();
        assert_eq!(len, std::env::current_exe().unwrap().metadata().unwrap().len());
        let mut read = [0u8; 4096];
        file.read_exact_at(&mut read, offset).unwrap();
        assert_eq!(read, page);
        let heap = vec![1u8; 1 << 20];
        let start = heap.as_ptr().align_offset(4096);
        assert!(file_behind(&heap[start..start + 4096]).is_none());
    }

    #[test]
    fn a_library_that_was_cut_is_not_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libkrunfw.so.5");
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(missing_end(&path), None);
        for len in [0, 63, 64, 4096, 65536] {
            std::fs::write(&path, &whole[..len]).unwrap();
            let Err(OpenError::Other(text)) = open(&path) else { panic!("{len} bytes were loaded") };
            assert!(text.contains("not fetched to the end"), "{len}: {text}");
        }
        // The loader's to judge.
        std::fs::write(&path, [b'x'; 4096]).unwrap();
        assert_eq!(missing_end(&path), None);
    }

    #[test]
    fn a_pipe_is_no_library() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        // Opening it for reading would wait for a writer.
        assert!(open_regular(&path).is_none());
    }

    #[test]
    fn ranges_that_are_not_mapped_are_seen() {
        assert!(mapped(own_path as *const () as usize, 1));
        assert!(!mapped(4096, 4096));
        assert!(!mapped(usize::MAX, 2));
        let heap = Box::new([1u8; 64]);
        assert!(!mapped(heap.as_ptr() as usize, 1 << 46));
    }

    #[test]
    fn lines_of_maps_are_understood() {
        let m = parse_map(b"7f0000000000-7f0000001000 r-xp 00002000 08:01 1234   /a b/c").unwrap();
        assert_eq!((m.start, m.end, m.offset), (0x7f00_0000_0000, 0x7f00_0000_1000, 0x2000));
        assert_eq!((m.device, m.inode, m.path), ((8, 1), 1234, PathBuf::from("/a b/c")));
        assert!(m.readable);
        assert!(parse_map(b"").is_none());
        assert!(parse_map(b"7f-80 ---p 0 0:0 x").is_none());
    }
}
