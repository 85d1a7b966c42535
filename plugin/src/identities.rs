//! Which identities there are, kept in one directory each, and who uses them.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tailnode_node::{Secret, StateError};
use tokio::{sync::watch, time::Instant};

use crate::{Error, api::Engine, interface::blocking, options};

/// How long a container waits for the node of an earlier one of its name: engines have no two of a
/// name, but the kernel takes its time to end a network namespace.
const REPLACED: Duration = Duration::from_secs(3);

/// The largest file with a node that is taken, in bytes. The map of 10,000 peers has some ten million.
const MAX_MOVING: u64 = 64 << 20;

/// The format of such files.
const MOVING_VERSION: u32 = 1;

/// In an identity's directory: which container used it last.
const USER: &str = "container.json";

/// The identities of a host's nodes. A network and a hostname make one, and keep its keys and so
/// its address from one container to the next.
pub(crate) struct Identities {
    directory: PathBuf,
    held: Arc<watch::Sender<HashMap<PathBuf, Holder>>>,
}

/// Who has an identity now.
#[derive(Clone)]
struct Holder {
    state: Held,
    /// `None`: nobody may have it for a moment.
    user: Option<User>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Running,
    Ending,
}

/// A container by its name, which it keeps when it is created again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct User {
    pub(crate) engine: Engine,
    pub(crate) container: String,
}

/// An identity in use: nobody else gets it until this is dropped.
pub(crate) struct Identity {
    /// The name to ask for.
    pub(crate) hostname: String,
    /// Where its keys are.
    pub(crate) directory: PathBuf,
    /// Whether it has none yet.
    pub(crate) fresh: bool,
    held: Arc<watch::Sender<HashMap<PathBuf, Holder>>>,
}

/// An identity that is kept, whoever uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) network: String,
    pub(crate) hostname: String,
    directory: PathBuf,
    /// Who used it last.
    user: Option<User>,
}

/// A node on its way to another host.
#[derive(Serialize, Deserialize)]
struct Moving {
    version: u32,
    network: String,
    hostname: String,
    /// What [`tailnode_node::export`] made.
    node: serde_json::Value,
}

impl Identities {
    /// Those with their keys below `directory`.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Identities {
            directory,
            held: Arc::new(watch::Sender::new(HashMap::new())),
        }
    }

    /// Takes the identity of `hostname` on `network`, or where another running container has it, that
    /// of `hostname-1` and so on; a container that had one gets the same again. One whose node is
    /// just stopping is waited for. `exist` has the names of the engine's containers, if they are
    /// known: nobody comes back for what others had.
    pub(crate) async fn take(
        &self,
        network: &str,
        hostname: &str,
        user: &User,
        exist: Option<&HashSet<String>>,
        deadline: Instant,
    ) -> Result<Identity, Error> {
        let network = self.directory.join(file_name(network));
        let patient = deadline.min(Instant::now() + REPLACED);
        let mut changes = self.held.subscribe();
        loop {
            changes.mark_unchanged();
            let place = network.clone();
            let mut last = blocking(move || users(&place)).await;
            last.retain(|_, last| {
                let known = exist.filter(|_| last.engine == user.engine);
                last == user || known.is_none_or(|names| names.contains(&last.container))
            });
            let until = match Instant::now() < patient {
                true => patient,
                false => deadline,
            };
            let mut taken = None;
            self.held.send_if_modified(|held| {
                let holder = |name: &str| held.get(&network.join(name));
                taken = choose(hostname, user, holder, &last, until == patient);
                if let Some(name) = &taken {
                    let holder = Holder {
                        state: Held::Running,
                        user: Some(user.clone()),
                    };
                    held.insert(network.join(name), holder);
                }
                taken.is_some()
            });
            if let Some(hostname) = taken {
                let directory = network.join(&hostname);
                let identity = Identity {
                    fresh: !directory.exists(),
                    hostname,
                    directory,
                    held: self.held.clone(),
                };
                return Ok(identity);
            }
            let change = tokio::time::timeout_at(until, changes.changed()).await;
            if change.is_err() && until == deadline {
                return Err(Error::StillStopping {
                    hostname: hostname.to_owned(),
                });
            }
        }
    }

    /// Takes a node out of its tailnet, unless only what this host has of it is to go, and removes
    /// its identity.
    pub(crate) async fn forget(
        &self,
        wanted: &str,
        network: Option<&str>,
        local: bool,
    ) -> Result<Kept, Error> {
        let (kept, identity) = self.hold(wanted, network).await?;
        if local {
            let directory = identity.directory.clone();
            blocking(move || tailnode_node::remove(&directory))
                .await
                .map_err(Error::file("remove", &kept.directory))?;
        } else {
            tailnode_node::forget(&identity.directory, &identity.hostname).await?;
        }
        tracing::info!(
            network = kept.network,
            hostname = kept.hostname,
            local,
            "forgot a node"
        );
        Ok(kept)
    }

    /// Writes what another host needs to run a node into a file.
    pub(crate) async fn export(
        &self,
        wanted: &str,
        network: Option<&str>,
        file: OwnedFd,
    ) -> Result<Kept, Error> {
        let (kept, identity) = self.hold(wanted, network).await?;
        let place = kept.clone();
        blocking(move || {
            let node = tailnode_node::export(&identity.directory)?;
            let moving = Moving {
                version: MOVING_VERSION,
                network: place.network,
                hostname: place.hostname,
                node: serde_json::from_str(node.expose()).map_err(unwritable)?,
            };
            let text = Secret::new(serde_json::to_string(&moving).map_err(unwritable)?);
            File::from(file)
                .write_all(text.expose().as_bytes())
                .map_err(Error::file("write", "the exported node"))
        })
        .await?;
        tracing::info!(
            network = kept.network,
            hostname = kept.hostname,
            "exported a node"
        );
        Ok(kept)
    }

    /// Keeps a node that another host exported, on the network that it was on there or on another.
    /// `origin` stands for the file in messages.
    pub(crate) async fn import(
        &self,
        network: Option<String>,
        origin: PathBuf,
        file: OwnedFd,
    ) -> Result<Kept, Error> {
        let from = origin.clone();
        let moving = blocking(move || read_moving(file, &from)).await?;
        let network = network.unwrap_or(moving.network);
        let directory = self
            .directory
            .join(file_name(&network))
            .join(&moving.hostname);
        let kept = Kept {
            network,
            hostname: moving.hostname,
            directory,
            user: None,
        };
        let identity = self.hold_at(&kept)?;
        let node = Secret::new(moving.node.to_string());
        let imported =
            blocking(move || tailnode_node::import(&identity.directory, node.expose(), &origin));
        match imported.await {
            Err(StateError::Taken { .. }) => Err(Error::NodeExists {
                hostname: kept.hostname,
                network: kept.network,
            }),
            imported => {
                imported?;
                tracing::info!(
                    network = kept.network,
                    hostname = kept.hostname,
                    "imported a node"
                );
                Ok(kept)
            }
        }
    }

    /// Takes an identity that no container uses, by its hostname or that of a container.
    async fn hold(&self, wanted: &str, network: Option<&str>) -> Result<(Kept, Identity), Error> {
        let directory = self.directory.clone();
        let all = blocking(move || kept(&directory)).await?;
        let kept = find(all, wanted, network)?;
        let identity = self.hold_at(&kept)?;
        Ok((kept, identity))
    }

    fn hold_at(&self, kept: &Kept) -> Result<Identity, Error> {
        let mut holder = None;
        self.held.send_if_modified(|held| {
            holder = held.get(&kept.directory).cloned();
            if holder.is_none() {
                // Who wants it waits, as for a node that stops.
                let (state, user) = (Held::Ending, None);
                held.insert(kept.directory.clone(), Holder { state, user });
            }
            holder.is_none()
        });
        match holder {
            None => Ok(Identity {
                hostname: kept.hostname.clone(),
                directory: kept.directory.clone(),
                fresh: false,
                held: self.held.clone(),
            }),
            Some(Holder {
                state: Held::Running,
                user: Some(User { engine, container }),
            }) => Err(Error::NodeRuns {
                hostname: kept.hostname.clone(),
                network: kept.network.clone(),
                engine,
                container,
            }),
            Some(_) => Err(Error::StillStopping {
                hostname: kept.hostname.clone(),
            }),
        }
    }
}

impl Identity {
    /// Says that the node is being stopped: who wants the identity next waits for that.
    pub(crate) fn ending(&self) {
        self.held.send_modify(|held| {
            if let Some(holder) = held.get_mut(&self.directory) {
                holder.state = Held::Ending;
            }
        });
    }

    /// Notes who uses it, so that the same container gets it again. Its directory must be there.
    pub(crate) async fn note_user(&self) {
        let held = self.held.borrow().get(&self.directory).cloned();
        let Some(user) = held.and_then(|holder| holder.user) else {
            return;
        };
        let directory = self.directory.clone();
        let note = move || {
            if user_of(&directory).as_ref() == Some(&user) {
                return Ok(());
            }
            let text = serde_json::to_vec(&user)?;
            tailnode_node::file::replace(&directory.join(USER), &text)
        };
        if let Err(error) = blocking(note).await {
            tracing::warn!(
                "cannot write {}: {error}; where containers share a hostname, they may change their \
                 names when they start again",
                self.directory.join(USER).display()
            );
        }
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        self.held.send_modify(|held| {
            held.remove(&self.directory);
        });
    }
}

/// The name that a container gets where it wants `hostname`; `None`: it must wait. `last` tells who
/// used which name last, and `patient` whether the container may wait for one of its own name to end.
fn choose<'a>(
    hostname: &str,
    user: &User,
    holder: impl Fn(&str) -> Option<&'a Holder>,
    last: &HashMap<String, User>,
    patient: bool,
) -> Option<String> {
    let is_own = |name: &str| last.get(name) == Some(user);
    let mut own: Vec<_> = last
        .keys()
        .filter(|name| is_own(name))
        .filter_map(|name| number_of(name, hostname))
        .collect();
    own.sort_unstable();
    // What was taken first of all is not noted at once.
    own.push(0);
    for name in own.into_iter().map(|number| numbered(hostname, number)) {
        match holder(&name) {
            None if is_own(&name) => return Some(name),
            Some(holder) if holder.state == Held::Ending => return None,
            Some(holder) if patient && holder.user.as_ref() == Some(user) => return None,
            _ => {}
        }
    }
    for number in 0.. {
        let name = numbered(hostname, number);
        // The first is for whoever comes while nobody has it. A number stays with its container.
        let is_free = number == 0 || is_own(&name) || !last.contains_key(&name);
        match holder(&name).map(|holder| holder.state) {
            None if is_free => return Some(name),
            Some(Held::Ending) if is_free => return None,
            _ => {}
        }
    }
    None
}

/// The name of the `number`th container that wants `hostname`, from 0.
fn numbered(hostname: &str, number: usize) -> String {
    match number {
        0 => hostname.to_owned(),
        _ => options::numbered_label(hostname, number),
    }
}

/// Which number a name is of a hostname's, if it is one of them.
fn number_of(name: &str, hostname: &str) -> Option<usize> {
    if name == hostname {
        return Some(0);
    }
    let (_, number) = name.rsplit_once('-')?;
    let number = number.parse().ok()?;
    (numbered(hostname, number) == name).then_some(number)
}

/// The identity that is meant: by hostname, else by the name of the container that used it last.
fn find(all: Vec<Kept>, wanted: &str, network: Option<&str>) -> Result<Kept, Error> {
    let here = |kept: &&Kept| network.is_none_or(|network| kept.network == network);
    let by_hostname = |kept: &&Kept| kept.hostname == wanted;
    let by_container = |kept: &&Kept| {
        kept.user
            .as_ref()
            .is_some_and(|user| user.container == wanted)
    };
    let mut found: Vec<_> = all.iter().filter(here).filter(by_hostname).collect();
    if found.is_empty() {
        found = all.iter().filter(here).filter(by_container).collect();
    }
    let list = |all: &mut dyn Iterator<Item = &Kept>| {
        let words = all.map(|kept| format!("{} on {}", kept.hostname, kept.network));
        words.collect::<Vec<_>>().join(", ")
    };
    match found[..] {
        [kept] => Ok(kept.clone()),
        [] => Err(Error::NoNode {
            wanted: wanted.to_owned(),
            known: match all.is_empty() {
                true => "nothing at all".into(),
                false => list(&mut all.iter()),
            },
        }),
        _ => Err(Error::ManyNodes {
            wanted: wanted.to_owned(),
            list: list(&mut found.into_iter()),
        }),
    }
}

/// All identities, by network and hostname.
fn kept(directory: &Path) -> Result<Vec<Kept>, Error> {
    let mut all = Vec::new();
    for network in directories(directory)? {
        let Some(name) = network.file_name().and_then(|name| name_of(name.to_str()?)) else {
            continue;
        };
        for directory in directories(&network)? {
            if let Some(hostname) = directory.file_name().and_then(|name| name.to_str()) {
                all.push(Kept {
                    network: name.clone(),
                    hostname: hostname.to_owned(),
                    user: user_of(&directory),
                    directory,
                });
            }
        }
    }
    all.sort_by(|a, b| (&a.network, &a.hostname).cmp(&(&b.network, &b.hostname)));
    Ok(all)
}

/// Who used the identities of a network last. What cannot be read tells nothing.
fn users(network: &Path) -> HashMap<String, User> {
    let identities = directories(network).unwrap_or_default().into_iter();
    identities
        .filter_map(|directory| {
            let name = directory.file_name()?.to_str()?.to_owned();
            Some((name, user_of(&directory)?))
        })
        .collect()
}

fn user_of(directory: &Path) -> Option<User> {
    serde_json::from_slice(&fs::read(directory.join(USER)).ok()?).ok()
}

fn directories(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let list = || -> io::Result<_> {
        let mut list = Vec::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                list.push(entry.path());
            }
        }
        Ok(list)
    };
    match list() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        list => list.map_err(Error::file("read", directory)),
    }
}

fn read_moving(file: OwnedFd, origin: &Path) -> Result<Moving, Error> {
    let file = File::from(file);
    let mut text = String::new();
    let read = file.take(MAX_MOVING + 1).read_to_string(&mut text);
    read.map_err(Error::file("read", origin))?;
    let no_node = |reason: String| Error::NotANode {
        path: origin.to_owned(),
        reason,
    };
    if text.len() as u64 > MAX_MOVING {
        return Err(no_node("it is too long".into()));
    }
    // Where it is wrong and not how: it holds keys.
    let moving: Moving = serde_json::from_str(&text)
        .map_err(|error| no_node(format!("after {} characters it is no node", error.column())))?;
    if moving.version > MOVING_VERSION {
        return Err(no_node("a newer release wrote it: upgrade tailnode".into()));
    }
    if options::dns_label(&moving.hostname).as_ref() != Some(&moving.hostname) {
        return Err(no_node("its hostname is none".into()));
    }
    Ok(moving)
}

fn unwritable(error: serde_json::Error) -> Error {
    Error::file("write", "the exported node")(error.into())
}

/// A file name that no other network's name gives: what is not a letter, digit, hyphen,
/// underscore or inner dot becomes %XX.
pub(crate) fn file_name(name: &str) -> String {
    let mut file_name = String::new();
    for (position, byte) in name.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => file_name.push(byte.into()),
            b'.' if position > 0 => file_name.push('.'),
            _ => file_name.push_str(&format!("%{byte:02X}")),
        }
    }
    if file_name.is_empty() {
        "%".into()
    } else {
        file_name
    }
}

/// The network whose directory has this name.
fn name_of(file_name: &str) -> Option<String> {
    let mut name = Vec::new();
    let mut rest = file_name.bytes();
    while let Some(byte) = rest.next() {
        name.push(match byte {
            b'%' if rest.len() == 0 => break,
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            _ => byte,
        });
    }
    String::from_utf8(name).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn user(container: &str) -> User {
        User {
            engine: Engine::Podman,
            container: container.into(),
        }
    }

    /// As a container of this name does.
    async fn start(identities: &Identities, container: &str, hostname: &str) -> Identity {
        let user = user(container);
        let taken = identities
            .take("tailnet", hostname, &user, None, soon())
            .await;
        let identity = taken.unwrap();
        fs::create_dir_all(&identity.directory).unwrap();
        identity.note_user().await;
        identity
    }

    #[tokio::test]
    async fn one_name_is_one_identity_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let identities = Identities::new(directory.path().to_owned());
        let [a, b] = ["a", "b"].map(user);
        let first = identities
            .take("tailnet", "web", &a, None, soon())
            .await
            .unwrap();
        let second = identities
            .take("tailnet", "web", &b, None, soon())
            .await
            .unwrap();
        let elsewhere = identities
            .take("other", "web", &a, None, soon())
            .await
            .unwrap();
        assert_eq!(
            (&*first.hostname, &*second.hostname, &*elsewhere.hostname),
            ("web", "web-1", "web")
        );
        assert!(first.fresh && first.directory.ends_with("tailnet/web"));
        fs::create_dir_all(&first.directory).unwrap();
        drop(first);
        let again = identities
            .take("tailnet", "web", &a, None, soon())
            .await
            .unwrap();
        assert_eq!(again.hostname, "web");
        assert!(!again.fresh);
    }

    #[tokio::test]
    async fn each_of_two_keeps_its_name_in_whatever_order_they_start_again() {
        let directory = tempfile::tempdir().unwrap();
        let identities = Identities::new(directory.path().to_owned());
        let (first, second) = (
            start(&identities, "a", "web").await,
            start(&identities, "b", "web").await,
        );
        assert_eq!(second.hostname, "web-1");
        drop((first, second));
        // The daemon may have ended in between.
        let identities = Identities::new(directory.path().to_owned());
        let second = start(&identities, "b", "web").await;
        let first = start(&identities, "a", "web").await;
        assert_eq!((&*first.hostname, &*second.hostname), ("web", "web-1"));
        drop(second);
        // A third one takes the name of neither, not even while the second is stopped.
        let third = start(&identities, "c", "web").await;
        assert_eq!(third.hostname, "web-2");
        assert_eq!(start(&identities, "b", "web").await.hostname, "web-1");
        // Unless nobody will come back for it.
        let exist = ["a", "c", "d"].map(String::from).into();
        let fourth = user("d");
        let taken = identities.take("tailnet", "web", &fourth, Some(&exist), soon());
        assert_eq!(taken.await.unwrap().hostname, "web-1");
        drop(first);
        // Created again under another name it is the same for the tailnet.
        assert_eq!(start(&identities, "d", "web").await.hostname, "web");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_created_again_waits_for_its_predecessor_to_end() {
        let directory = tempfile::tempdir().unwrap();
        let identities = Identities::new(directory.path().to_owned());
        let first = start(&identities, "a", "web").await;
        // Its namespace takes a while to end.
        let (next, ()) = tokio::join!(start(&identities, "a", "web"), async move {
            tokio::time::sleep(REPLACED - Duration::from_millis(1)).await;
            drop(first);
        });
        assert_eq!(next.hostname, "web");
        // Nor does it wait for ever: the first may have been renamed, and run.
        let beside = start(&identities, "a", "web").await;
        assert_eq!(beside.hostname, "web-1");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_ending_is_waited_for() {
        let identities = Identities::new("/nonexistent".into());
        let user = user("web");
        let take = |deadline| identities.take("tailnet", "web", &user, None, deadline);
        let first = take(soon()).await.unwrap();
        first.ending();
        let error = take(soon()).await.err().unwrap();
        assert!(matches!(error, Error::StillStopping { .. }), "{error}");
        let (next, ()) = tokio::join!(take(soon()), async move {
            tokio::time::sleep(2 * REPLACED).await;
            drop(first);
        });
        assert_eq!(next.unwrap().hostname, "web");
    }

    #[tokio::test]
    async fn what_is_kept_is_found_by_hostname_or_container() {
        let directory = tempfile::tempdir().unwrap();
        let identities = Identities::new(directory.path().to_owned());
        let web = start(&identities, "front", "web").await;
        let kept = |wanted: &'static str, network| identities.hold(wanted, network);
        let error = kept("front", None).await.err().unwrap().to_string();
        assert!(error.contains("`podman stop front`"), "{error}");
        drop(web);
        for wanted in ["front", "web"] {
            let (kept, identity) = kept(wanted, Some("tailnet")).await.unwrap();
            assert_eq!((&*kept.network, &*kept.hostname), ("tailnet", "web"));
            let busy = identities.hold("web", None).await.err().unwrap();
            assert!(matches!(busy, Error::StillStopping { .. }), "{busy}");
            drop(identity);
        }
        let error = kept("front", Some("other")).await.err().unwrap();
        assert!(error.to_string().contains("web on tailnet"), "{error}");
        for sly in ["", ".", "..", "../tailnet/web"] {
            let error = kept(sly, None).await.err().unwrap();
            assert!(matches!(error, Error::NoNode { .. }), "{error}");
        }
        fs::create_dir_all(directory.path().join("lab/web")).unwrap();
        let error = kept("web", None).await.err().unwrap().to_string();
        assert!(error.contains("web on lab, web on tailnet"), "{error}");
        assert!(error.contains("--network"), "{error}");
    }

    #[tokio::test]
    async fn what_is_no_node_is_not_imported() {
        let directory = tempfile::tempdir().unwrap();
        let identities = Identities::new(directory.path().to_owned());
        for text in [
            "",
            "QQQQ",
            r#"{"version":1,"network":"tailnet","hostname":"QQQQ"}"#,
            r#"{"version":2,"network":"tailnet","hostname":"web","node":{}}"#,
            r#"{"version":1,"network":"tailnet","hostname":"../web","node":{}}"#,
            r#"{"version":1,"network":"tailnet","hostname":"web","node":{"version":1}}"#,
        ] {
            let path = directory.path().join("moving");
            fs::write(&path, text).unwrap();
            let file = File::open(&path).unwrap().into();
            let imported = identities.import(None, "web.node".into(), file).await;
            let error = imported.unwrap_err().to_string();
            assert!(error.contains("web.node"), "{error}");
            assert!(!error.contains("QQQQ"), "{error}");
            assert!(!directory.path().join("tailnet").exists());
        }
    }

    proptest! {
        #[test]
        fn two_networks_never_share_a_directory(one: String, other: String) {
            prop_assert_eq!(one == other, file_name(&one) == file_name(&other));
            prop_assert!(!file_name(&one).contains('/'));
            prop_assert!(!file_name(&one).starts_with('.'));
            prop_assert_eq!(name_of(&file_name(&one)), Some(one));
        }
    }
}
