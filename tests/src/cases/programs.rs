//! Real programs in the guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Case, Env, Failure, TempDir, no_guest, run, same};
use krun::Share;

pub const PYTHON: Case = Case { name: "programs_python", host: python, guest: no_guest };
pub const GIT: Case = Case { name: "programs_git", host: git, guest: no_guest };
pub const COMPILE: Case = Case { name: "programs_compile", host: compile, guest: no_guest };
pub const DPKG: Case = Case { name: "programs_dpkg", host: dpkg, guest: no_guest };

const PYTHON_SCRIPT: &str = r#"
import os, subprocess, sys, tempfile, threading
total = []
def work(n):
    out = subprocess.run([sys.executable, "-c", f"print({n} * {n})"], capture_output=True, check=True).stdout
    total.append(int(out))
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
with tempfile.TemporaryFile() as f:
    f.write(b"x" * 100000); f.seek(0); assert len(f.read()) == 100000
r, w = os.pipe()
if os.fork() == 0:
    os.write(w, b"child"); os._exit(0)
assert os.read(r, 10) == b"child"
print(sum(total))
"#;

fn python(env: &Env) -> Result<(), Failure> {
    let mut config = env.program("python3", ["-c", PYTHON_SCRIPT]);
    config.vcpus = 2;
    same("python", run(config)?.success()?.out().as_str(), "14\n")?;
    let perl = r#"my %h; $h{$_ % 7}++ for 1..1000; print join(",", map { "$_=$h{$_}" } sort keys %h), "\n";"#;
    let output = run(env.program("perl", ["-e", perl]))?.success()?;
    same("perl", output.out().as_str(), "0=142,1=143,2=143,3=143,4=143,5=143,6=143\n")
}

fn git(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("git")?;
    let mut config = env.shell(
        "set -e; cd /media; git config --global user.email a@b; git config --global user.name n; \
         git config --global --add safe.directory '*'; git init -q -b main source; cd source; \
         for i in $(seq 60); do echo $i > file$i; done; git add .; git commit -q -m one; \
         seq 2000 > big; git add .; git commit -q -m two; cd ..; git clone -q source copy; \
         cd copy; git fsck --strict; git log --oneline | wc -l; diff -r ../source/file7 file7",
    );
    config.memory_mib = 512;
    // The root keeps no trace of the test.
    config.command = config.command.env("GIT_CONFIG_GLOBAL", "/media/config");
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("git", dir.path()) });
    let output = run(config)?.success()?;
    same("commits in the clone", output.out().trim(), "2")?;
    same("the clone on the host", fs::read_to_string(dir.path().join("copy/file42"))?.as_str(), "42\n")
}

fn compile(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("compile")?;
    fs::write(
        dir.path().join("main.c"),
        "#include <stdio.h>\n#include \"other.h\"\nint main(void) { printf(\"%d\\n\", other(6)); return other(1); }\n",
    )?;
    fs::write(dir.path().join("other.c"), "#include \"other.h\"\nint other(int x) { return x * 7; }\n")?;
    fs::write(dir.path().join("other.h"), "int other(int x);\n")?;
    let mut config = env.shell(
        "cd /media && (gcc -O2 -c main.c & gcc -O2 -c other.c & wait) && gcc -o prog main.o other.o && ./prog",
    );
    (config.vcpus, config.memory_mib) = (2, 512);
    config.shares.push(Share { mount: Some("/media".into()), ..Share::new("c", dir.path()) });
    let output = run(config)?;
    same("status of the compiled program", (output.code, output.err().as_str()), (7, ""))?;
    same("output of the compiled program", output.out().as_str(), "42\n")
}

/// A view of the root that can be changed, and is gone with the value.
pub struct Copy(TempDir);

impl Copy {
    /// Of this root.
    pub fn of(root: &Path) -> Result<Self, Failure> {
        let dir = TempDir::new("root")?;
        for part in ["upper", "work", "merged"] {
            fs::create_dir(dir.path().join(part))?;
        }
        let at = dir.path().display();
        let options = format!("lowerdir={},upperdir={at}/upper,workdir={at}/work", root.display());
        let target = dir.path().join("merged");
        let status =
            Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&target).status()?;
        if status.success() {
            Ok(Self(dir))
        } else {
            Err(Failure::Wrong(format!("mount -o {options}: {status}")))
        }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.0.path().join("merged")
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

/// A package that dpkg unpacks and configures in a root: file modes, a link, a maintainer script.
fn dpkg(env: &Env) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::Skip("a changeable view of the root needs mount, and so root".into()));
    }
    let root = Copy::of(&env.root)?;
    let script = "set -e; mkdir -p /tmp/p/DEBIAN /tmp/p/usr/share/krun; cd /tmp; chmod 755 p/DEBIAN; \
        printf 'Package: krun-test\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b>\\nDescription: test\\n' > p/DEBIAN/control; \
        printf '#!/bin/sh\\necho configured > /usr/share/krun/state\\n' > p/DEBIAN/postinst; chmod 755 p/DEBIAN/postinst; \
        seq 5000 > p/usr/share/krun/data; ln -s data p/usr/share/krun/link; \
        dpkg-deb --root-owner-group -b p krun-test.deb >/dev/null; dpkg -i krun-test.deb >/dev/null; \
        dpkg -V krun-test; cat /usr/share/krun/state; wc -l < /usr/share/krun/link";
    let mut config = env.shell(script);
    config.memory_mib = 512;
    config.shares = vec![Share::root(root.path())];
    let output = run(config)?.success()?;
    same("dpkg", output.out().as_str(), "configured\n5000\n")?;
    let status = fs::read_to_string(root.path().join("var/lib/dpkg/info/krun-test.list"))?;
    same("the package is listed on the host", status.contains("/usr/share/krun/data"), true)?;
    Ok(())
}
