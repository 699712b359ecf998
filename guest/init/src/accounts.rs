//! Users and groups: `/etc/passwd` and `/etc/group` of the guest.

use krun_wire::User;

use crate::failure::{Failure, show};

/// What a process needs to be to run as a user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: Vec<u8>,
}

fn number(text: &[u8]) -> Option<u32> {
    // All ones is "no change" to the system calls.
    std::str::from_utf8(text).ok()?.parse().ok().filter(|n| *n != u32::MAX)
}

/// The entries of a colon-separated file that have at least `N` fields.
fn entries<const N: usize>(file: &[u8]) -> impl Iterator<Item = [&[u8]; N]> {
    file.split(|b| *b == b'\n').filter_map(|line| {
        let mut fields = line.split(|b| *b == b':');
        let mut entry = [&[][..]; N];
        for field in &mut entry {
            *field = fields.next()?;
        }
        Some(entry)
    })
}

/// Looks `user` up. A name must have an entry; a number need not: it then has group 0, no further groups
/// and `/` as its home.
///
/// # Errors
/// 125 with the name that has no entry.
pub fn identify(user: &User, passwd: &[u8], group: &[u8]) -> Result<Identity, Failure> {
    let as_number = number(&user.user);
    let mut named = None;
    for [name, _, uid, gid, _, home] in entries::<6>(passwd) {
        let (Some(uid), Some(gid)) = (number(uid), number(gid)) else { continue };
        if name == user.user || Some(uid) == as_number {
            named = Some((name, Identity { uid, gid, groups: Vec::new(), home: home.to_vec() }));
            break;
        }
    }
    let (name, mut identity) = match (named, as_number) {
        (Some((name, identity)), _) => (Some(name), identity),
        (None, Some(uid)) => (None, Identity { uid, home: b"/".to_vec(), ..Identity::default() }),
        (None, None) => {
            return Err(Failure::setup(format!(
                "There is no user {} in the guest's /etc/passwd; give a number to do without an entry.",
                show(&user.user)
            )));
        }
    };
    if let Some(name) = name {
        let member =
            entries::<4>(group).filter(|[.., members]| members.split(|b| *b == b',').any(|m| m == name));
        identity.groups.extend(member.filter_map(|[_, _, gid, _]| number(gid)));
    }
    if let Some(wanted) = &user.group {
        let by_name =
            entries::<3>(group).find(|[name, ..]| name == wanted).and_then(|[_, _, gid]| number(gid));
        identity.gid = by_name.or_else(|| number(wanted)).ok_or_else(|| {
            Failure::setup(format!("There is no group {} in the guest's /etc/group.", show(wanted)))
        })?;
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n# odd\nbad:x:y:z:::\nweb:x:33:34:W:/var/www:\nanna:x:1000:1000::/home/\xff\n";
    const GROUP: &[u8] = b"root:x:0:\nadm:x:4:anna,web\nwww:x:34:\nvideo:x:44:anna\n1000:x:7:\n";

    fn of(user: &[u8], group: Option<&[u8]>) -> Result<Identity, Failure> {
        identify(&User { user: user.to_vec(), group: group.map(<[u8]>::to_vec) }, PASSWD, GROUP)
    }

    #[test]
    fn names_bring_groups_and_home() {
        let anna = Identity { uid: 1000, gid: 1000, groups: vec![4, 44], home: b"/home/\xff".to_vec() };
        assert_eq!(of(b"anna", None), Ok(anna.clone()));
        assert_eq!(of(b"1000", None), Ok(anna));
    }

    #[test]
    fn a_group_replaces_the_primary_one_and_a_name_wins_over_a_number() {
        assert_eq!(of(b"web", Some(b"video")).unwrap().gid, 44);
        assert_eq!(of(b"web", Some(b"77")).unwrap().gid, 77);
        assert_eq!(of(b"web", Some(b"1000")).unwrap().gid, 7);
    }

    #[test]
    fn numbers_without_entries() {
        let want = Identity { uid: 4242, gid: 0, groups: vec![], home: b"/".to_vec() };
        assert_eq!(of(b"4242", None), Ok(want));
    }

    #[test]
    fn unknown_names_are_told() {
        assert!(of(b"nobody", None).unwrap_err().reason.contains("no user nobody"));
        assert!(of(b"bad", None).unwrap_err().reason.contains("no user bad"));
        assert!(of(b"web", Some(b"x y")).unwrap_err().reason.contains("no group x y"));
        assert_eq!(of(b"4294967295", None).unwrap_err().status, 125);
    }

    proptest! {
        #[test]
        fn no_file_panics(passwd: Vec<u8>, group: Vec<u8>, user: Vec<u8>) {
            let _ = identify(&User { group: Some(user.clone()), user }, &passwd, &group);
        }
    }
}
