//! `krun lab --exact`: a command in a machine whose time is a count of instructions.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use krun_lab::{Engine, Exact, ExactFile, Source};

use crate::args::Lab;

/// Memory of the machine: files and guests are all in it.
const MEMORY_MIB: u32 = 2048;

/// Runs the command and prints what it printed.
pub fn run(engine: Engine, args: &Lab) -> Result<i32, String> {
    let mut words = args.command.clone();
    let program = words.first_mut().ok_or("--exact needs a command")?;
    let path = find(program)?;
    *program = path.clone().into();
    let mut files = with_libraries(&path, &path)?;
    for added in &args.add {
        let (from, to) = added.split_once(':').unwrap_or((added, added));
        files.extend(with_libraries(Path::new(from), Path::new(to))?);
    }
    let env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    let engine = Engine { memory_mib: MEMORY_MIB, ..engine };
    let (status, printed) =
        engine.run_exact(&Exact { argv: words, env, files }).map_err(|e| e.to_string())?;
    let mut out = std::io::stdout().lock();
    out.write_all(&printed).and_then(|()| out.flush()).map_err(|e| format!("cannot print: {e}"))?;
    Ok(status)
}

/// The program's file.
fn find(program: &OsString) -> Result<PathBuf, String> {
    let name = Path::new(program);
    let found = if name.components().count() > 1 {
        std::fs::canonicalize(name).ok()
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file())
    };
    found.ok_or_else(|| format!("{} is not there", name.display()))
}

/// The file, and the libraries that the loader would load for it from where it would find them.
fn with_libraries(from: &Path, to: &Path) -> Result<Vec<ExactFile>, String> {
    let absolute = |p: &Path| std::path::absolute(p).map_err(|e| format!("{}: {e}", p.display()));
    let (from, to) = (absolute(from)?, absolute(to)?);
    if !from.is_file() {
        return Err(format!("{} is not a file", from.display()));
    }
    let file = |path: PathBuf, source: PathBuf| ExactFile { path, source: Source::Host(source), mode: None };
    // For what is no dynamic program, ldd prints a remark and fails.
    let out = Command::new("ldd").arg(&from).output().map_err(|e| format!("cannot run ldd: {e}"))?;
    let text = if out.status.success() { String::from_utf8_lossy(&out.stdout) } else { "".into() };
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    let mut files: Vec<_> = libraries.map(|l| file(l.into(), l.into())).collect();
    files.push(file(to, from));
    Ok(files)
}
