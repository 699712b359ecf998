//! Bad input: each with its own message, nothing left behind.

use krun::{Kernel, KernelFormat, Share, Vm, VmConfig};

use crate::harness::{Case, Env, Failure, TempDir, contains, no_guest, own_resources, same};

pub const CASE: Case = Case { name: "bad_input", host, guest: no_guest };

/// A file that is no kernel of any format.
fn not_a_kernel(dir: &TempDir) -> Result<std::path::PathBuf, Failure> {
    let path = dir.path().join("not-a-kernel");
    std::fs::write(&path, b"this is no kernel")?;
    Ok(path)
}

type Change = Box<dyn Fn(&mut VmConfig)>;

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("bad")?;
    let (file, missing) = (not_a_kernel(&dir)?, dir.path().join("missing"));
    let kernel = |path: &std::path::Path, format| {
        let kernel = Kernel::File { path: path.to_owned(), format, initramfs: None, cmdline: None };
        Box::new(move |c: &mut VmConfig| c.kernel = kernel.clone()) as Change
    };
    let root = |path: &std::path::Path| {
        let share = Share::root(path);
        Box::new(move |c: &mut VmConfig| c.shares = vec![share.clone()]) as Change
    };
    let mut changes: Vec<(&str, Change)> = vec![
        ("missing", root(&missing)),
        ("not-a-kernel", root(&file)),
        ("vCPU", Box::new(|c| c.vcpus = 0)),
        ("65", Box::new(|c| c.vcpus = 65)),
        ("1 MiB", Box::new(|c| c.memory_mib = 1)),
        ("10485760", Box::new(|c| c.memory_mib = 10 << 20)),
        ("36", Box::new(|c| c.shares.push(Share::new("x".repeat(37), "/")))),
        ("NUL", Box::new(|c| c.command.args.push("a\0b".into()))),
        ("missing", kernel(&missing, KernelFormat::Elf)),
    ];
    if let Some(bundle) = &env.kernel {
        // Less by a page, and by half: the loader takes such libraries, and reading their pages is SIGBUS.
        let bytes = std::fs::read(bundle)?;
        for len in [bytes.len() - 4096, bytes.len() / 2] {
            let path = dir.path().join(format!("cut-{len}.so"));
            std::fs::write(&path, &bytes[..len])?;
            let cut = Box::new(move |c: &mut VmConfig| c.kernel = Kernel::Bundle(Some(path.clone())));
            changes.push(("not fetched to the end", cut));
        }
    }
    let bundle = missing.clone();
    changes.push(("missing", Box::new(move |c| c.kernel = Kernel::Bundle(Some(bundle.clone())))));
    for format in [
        KernelFormat::Raw,
        KernelFormat::Elf,
        KernelFormat::ImageGz,
        KernelFormat::ImageBz2,
        KernelFormat::ImageZstd,
    ] {
        changes.push(("not-a-kernel", kernel(&file, format)));
    }
    // The bundle that is found first stays loaded.
    same("a good one", crate::harness::run(env.shell("true"))?.code, 0)?;
    let before = own_resources()?;
    let mut seen = Vec::new();
    for (part, change) in changes {
        let mut config = env.shell("true");
        change(&mut config);
        match Vm::start(config) {
            Ok(_) => return Err(Failure::Wrong(format!("the case for {part:?} was started"))),
            Err(e) => {
                contains("message", &e.to_string(), part)?;
                seen.push(e.to_string());
            }
        }
    }
    same("descriptors and threads", own_resources()?, before)?;
    cli(env, &dir)
}

/// The same through the command: status 125 and one or two sentences.
fn cli(env: &Env, dir: &TempDir) -> Result<(), Failure> {
    let volume = format!("{}:/mnt", dir.path().join("missing").display());
    for (args, part) in [
        (vec!["--volume", &volume], "no such directory"),
        (vec!["--root", "/"], "--root"),
        (vec!["--cpus", "65"], "65"),
        (vec!["--memory", "banana"], "banana"),
        (vec!["--user", ""], "USER"),
        (vec!["--tty"], "terminal"),
    ] {
        let output =
            env.krun()?.args(&args).args(["--", "true"]).stdin(std::process::Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        same(&format!("status of {args:?} ({text})"), output.status.code(), Some(125))?;
        contains(&format!("{args:?}"), &text, part)?;
    }
    let output = env.krun()?.args(["--", ""]).output()?;
    same("status of an empty command", output.status.code(), Some(125))?;
    contains("empty command", &String::from_utf8_lossy(&output.stderr), "empty word")?;
    // No bundle anywhere: not in the cache, and none was named.
    let krun = env.krun()?.get_program().to_owned();
    let output = std::process::Command::new(krun)
        .args(["run", "--accel", "kvm", "--root"])
        .arg(&env.root)
        .args(["--", "true"])
        .env("XDG_CACHE_HOME", dir.path())
        .output()?;
    if output.status.success() {
        return Err(Failure::Skip(
            "a kernel bundle is installed here; all but its absence was tested".into(),
        ));
    }
    same("status without a bundle", output.status.code(), Some(125))?;
    contains("no bundle", &String::from_utf8_lossy(&output.stderr), "libkrunfw.so.5 was not found")
}
