//! What a node keeps on disk: its keys and the last map.
//!
//! What cannot be read is set aside, and never overwritten; what is not ours to read is an error.

use std::{
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use chrono::Utc;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize, de::Error as _};
use tailnode_wire::keys::{
    DiscoKeyPair, DiscoPrivateKey, Export, ExportableKey, MachineKeyPair, MachinePrivateKey,
    NodeKeyPair, NodePrivateKey,
};
use tracing::{info, warn};
use url::Url;

use crate::{auth_key::Secret, file, netmap::Netmap};

/// The keys that make a node itself. Their file's time of modification is that of
/// [`Store::save_latest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// Names the machine to the control server. Never changes.
    pub machine: MachineKeyPair,
    /// Names the node to its peers, and is its WireGuard key. Changes when it expires.
    pub node: NodeKeyPair,
    /// The one that takes the place of an expired node key: kept from before the control server is
    /// asked until it has agreed, or a crash in between would lose the only key that it knows.
    pub next: Option<NodeKeyPair>,
    /// Seals path discovery. Kept over restarts while the clock goes forward, unlike in tailscaled: peers know the node by it
    /// while the control server, which would announce a new one, is away.
    pub disco: DiscoKeyPair,
    /// Where the unreadable keys are that the node had before these; until it has joined by these.
    pub replaces: Option<PathBuf>,
}

impl Keys {
    /// Keys of a node that never was.
    pub fn random() -> Self {
        Self {
            machine: MachineKeyPair::random(),
            node: NodeKeyPair::random(),
            next: None,
            disco: DiscoKeyPair::random(),
            replaces: None,
        }
    }
}

/// Why state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be made or read.
    #[error("cannot use {} for a node's state: {source}", dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has the directory.
    #[error(
        "{} is in use by another daemon: stop that one, or give this one another state directory",
        dir.display()
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// Somebody else could have written it.
    #[error(
        "{} belongs to user {owner} and not to user {ours}, as which this runs: see where it comes \
         from, then `chown {ours} {}`", path.display(), path.display()
    )]
    OtherOwner {
        /// The file or directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Whose it should be.
        ours: u32,
    },
    /// The keys belong to a tailnet elsewhere.
    #[error(
        "{} belongs to a node of {recorded}, not of {wanted}: set login-server back, or \
         `tailnode forget` the node, and it joins as a new one",
        dir.display()
    )]
    OtherServer {
        /// The directory.
        dir: PathBuf,
        /// The login server that the node joined.
        recorded: String,
        /// The login server asked for.
        wanted: String,
    },
    /// The keys cannot be read.
    #[error(
        "{} is damaged (line {line}, column {column}): restore it from a backup if there is one",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it is wrong; how is not said, which would quote it.
        line: usize,
        /// The byte in the line.
        column: usize,
    },
    /// A later release wrote it.
    #[error("{} was written by a newer release (format {version}): upgrade tailnode", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format.
        version: u32,
    },
    /// There are no keys.
    #[error("there is no node in {}", dir.display())]
    NoNode {
        /// The directory.
        dir: PathBuf,
    },
    /// There are keys already.
    #[error("there is a node in {} already", dir.display())]
    Taken {
        /// The directory.
        dir: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}; is the disk full or read-only?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// One node's directory, held by one process at a time.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    login_server: Url,
    /// Its advisory lock (flock) goes when it is closed, even by a crash.
    _handle: File,
}

const KEYS: &str = "keys.json";
const NETMAP: &str = "netmap.json";
/// The formats that are written; see [`KeysFile::parse`] for those that are read.
const KEYS_VERSION: u32 = 2;
const NETMAP_VERSION: u32 = 1;
const EXPORT_VERSION: u32 = 1;

#[derive(Deserialize)]
struct Format {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct KeysFile {
    version: u32,
    login_server: String,
    machine: Export<MachinePrivateKey>,
    node: Export<NodePrivateKey>,
    next: Option<Export<NodePrivateKey>>,
    disco: Export<DiscoPrivateKey>,
    replaces: Option<PathBuf>,
}

/// Format 1 had no place for a second node key, nor for where lost keys are.
#[derive(Deserialize)]
struct KeysFile1 {
    login_server: String,
    machine: Export<MachinePrivateKey>,
    node: Export<NodePrivateKey>,
    disco: Export<DiscoPrivateKey>,
}

#[derive(Serialize)]
struct NetmapFile<'a> {
    version: u32,
    netmap: &'a Netmap,
}

#[derive(Deserialize)]
struct OwnedNetmapFile {
    netmap: Netmap,
}

/// A node on its way to another host.
#[derive(Serialize, Deserialize)]
struct ExportFile {
    version: u32,
    /// A [`KeysFile`] of any format.
    keys: serde_json::Value,
    netmap: Option<Netmap>,
}

impl Store {
    /// Takes a directory for a node of a login server, making it (0700) where it is not there yet.
    ///
    /// # Errors
    /// If another process has it, or it cannot be made.
    pub fn open(dir: &Path, login_server: &Url) -> Result<Self, Error> {
        file::make_directory(dir).map_err(|source| Error::Unusable {
            dir: dir.into(),
            source,
        })?;
        Ok(Self {
            dir: dir.into(),
            login_server: login_server.clone(),
            _handle: lock(dir)?,
        })
    }

    /// Takes the directory of a node that has keys, whatever its login server is.
    ///
    /// # Errors
    /// If another process has it, or there are no keys that can be read.
    pub fn reopen(dir: &Path) -> Result<(Self, Keys), Error> {
        let no_node = || Error::NoNode { dir: dir.into() };
        if !dir.exists() {
            return Err(no_node());
        }
        let handle = lock(dir)?;
        let (_, file) = KeysFile::read(&dir.join(KEYS))?.ok_or_else(no_node)?;
        let login_server = file.login_server(&dir.join(KEYS))?;
        let store = Self {
            dir: dir.into(),
            login_server,
            _handle: handle,
        };
        Ok((store, file.into()))
    }

    /// Where the node joined, or is to join.
    pub fn login_server(&self) -> &Url {
        &self.login_server
    }

    /// The node's keys, made now if it has none. Those that cannot be read are set aside, and the
    /// new ones say so.
    ///
    /// # Errors
    /// If they are another user's, of a newer release, or made for another login server: a node
    /// that quietly took new keys would lose its name and address.
    pub fn keys(&self) -> Result<Keys, Error> {
        let path = self.dir.join(KEYS);
        let (version, file) = match KeysFile::read(&path) {
            Ok(Some(read)) => read,
            Ok(None) => return self.begin(None),
            Err(error @ Error::Damaged { .. }) => {
                let aside = self.set_aside(KEYS)?;
                warn!(
                    "{error}; it is kept as {} and the node needs a login",
                    aside.display()
                );
                return self.begin(Some(aside));
            }
            Err(error) => return Err(error),
        };
        if file.login_server != self.login_server.as_str() {
            return Err(Error::OtherServer {
                dir: self.dir.clone(),
                recorded: file.login_server,
                wanted: self.login_server.to_string(),
            });
        }
        let keys = file.into();
        if version < KEYS_VERSION {
            info!(path = %path.display(), "bringing the file to format {KEYS_VERSION}");
            self.save_keys(&keys)?;
        }
        Ok(keys)
    }

    /// New keys, and no map: one that is there tells of other keys.
    fn begin(&self, replaces: Option<PathBuf>) -> Result<Keys, Error> {
        if self.dir.join(NETMAP).exists() {
            if replaces.is_some() {
                self.set_aside(NETMAP)?;
            }
            self.remove(NETMAP)?;
        }
        let keys = Keys {
            replaces,
            ..Keys::random()
        };
        self.save_keys(&keys)?;
        Ok(keys)
    }

    /// Keeps keys in the place of the old.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn save_keys(&self, keys: &Keys) -> Result<(), Error> {
        self.write(KEYS, &KeysFile::new(keys, &self.login_server))
    }

    /// The last map kept. One that cannot be read is set aside and is as good as none: the control
    /// server will send another.
    pub fn load_netmap(&self) -> Option<Netmap> {
        let path = self.dir.join(NETMAP);
        let why = match read(&path) {
            Ok(None) => return None,
            Ok(Some(text)) => match parse_netmap(&path, &text) {
                Ok(netmap) => return Some(netmap),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let aside = self
            .set_aside(NETMAP)
            .and_then(|aside| self.remove(NETMAP).map(|()| aside));
        match aside {
            Ok(aside) => warn!(path = %aside.display(), why, "set the last network map aside"),
            Err(error) => warn!(why, "cannot set the last network map aside: {error}"),
        }
        None
    }

    /// Keeps a map in the place of the old.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_netmap(&self, netmap: &Netmap) -> Result<(), Error> {
        self.write(
            NETMAP,
            &NetmapFile {
                version: NETMAP_VERSION,
                netmap,
            },
        )
    }

    /// Keeps until when the node has run.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_latest(&self, time: SystemTime) -> Result<(), Error> {
        // Of no other use, and cheap: nothing is written but the time.
        let path = self.dir.join(KEYS);
        let write = || {
            let file = OpenOptions::new().write(true).open(&path)?;
            file.set_modified(time)
        };
        write().map_err(|source| Error::Write {
            path: path.clone(),
            source,
        })
    }

    /// Until when the node has run by what was kept last; `None`: it never has.
    pub fn latest(&self) -> Option<SystemTime> {
        fs::metadata(self.dir.join(KEYS)).ok()?.modified().ok()
    }

    fn write(&self, name: &str, content: &impl Serialize) -> Result<(), Error> {
        let path = self.dir.join(name);
        let write = || {
            let mut text = serde_json::to_vec(content)?;
            text.push(b'\n');
            file::replace(&path, &text)
        };
        write().map_err(|source| Error::Write {
            path: path.clone(),
            source,
        })
    }

    fn set_aside(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.dir.join(name);
        file::set_aside(&path, Utc::now()).map_err(|source| Error::Write { path, source })
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        fs::remove_file(&path).map_err(|source| Error::Write { path, source })
    }
}

/// What another host needs to run the node of a directory, as JSON. It holds the keys.
///
/// # Errors
/// If the node runs, or there is none, or its keys cannot be read.
pub fn export(dir: &Path) -> Result<Secret, Error> {
    let (store, keys) = Store::reopen(dir)?;
    let encode = || {
        serde_json::to_string(&ExportFile {
            version: EXPORT_VERSION,
            keys: serde_json::to_value(KeysFile::new(&keys, &store.login_server))?,
            netmap: store.load_netmap(),
        })
    };
    encode().map(Secret::new).map_err(|error| Error::Read {
        path: dir.join(KEYS),
        source: error.into(),
    })
}

/// Puts a node that was exported into a directory. It is complete, or not there at all.
///
/// # Errors
/// If the text is no node's, or the directory has one already. `origin` stands for the text in
/// messages.
pub fn import(dir: &Path, text: &str, origin: &Path) -> Result<(), Error> {
    check_version(origin, text.as_bytes(), EXPORT_VERSION)?;
    let ExportFile { keys, netmap, .. } =
        serde_json::from_str(text).map_err(|error| damaged(origin, &error))?;
    let (_, keys) = KeysFile::parse(origin, keys.to_string().as_bytes())?;
    let store = Store::open(dir, &keys.login_server(origin)?)?;
    if dir.join(KEYS).exists() {
        return Err(Error::Taken { dir: dir.into() });
    }
    // The keys are the last: they make it a node.
    let saved = netmap
        .map_or(Ok(()), |netmap| store.save_netmap(&netmap))
        .and_then(|()| store.save_keys(&keys.into()));
    if saved.is_err() {
        // A full disk needs the room; what was wrong is told by the first error.
        let _ = remove(dir);
    }
    saved
}

/// Removes a node's directory, if it is there.
///
/// # Errors
/// If something of it cannot be removed.
pub fn remove(dir: &Path) -> io::Result<()> {
    // A map without keys is nothing; keys without a map are a whole node. The rest may then go in
    // any order.
    for name in [NETMAP, KEYS] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl KeysFile {
    fn new(keys: &Keys, login_server: &Url) -> Self {
        Self {
            version: KEYS_VERSION,
            login_server: login_server.to_string(),
            machine: keys.machine.private.export(),
            node: keys.node.private.export(),
            next: keys.next.as_ref().map(|next| next.private.export()),
            disco: keys.disco.private.export(),
            replaces: keys.replaces.clone(),
        }
    }

    fn read(path: &Path) -> Result<Option<(u32, Self)>, Error> {
        read(path)?.map(|text| Self::parse(path, &text)).transpose()
    }

    /// Reads keys of any format up to ours, and tells of which.
    fn parse(path: &Path, text: &[u8]) -> Result<(u32, Self), Error> {
        let version = check_version(path, text, KEYS_VERSION)?;
        let file = match version {
            1 => serde_json::from_slice(text).map(KeysFile1::into),
            _ => serde_json::from_slice(text),
        };
        let file = file.map_err(|error| damaged(path, &error))?;
        Ok((version, file))
    }

    fn login_server(&self, path: &Path) -> Result<Url, Error> {
        let url = self.login_server.parse();
        url.map_err(|error| damaged(path, &serde_json::Error::custom(error)))
    }
}

impl From<KeysFile1> for KeysFile {
    fn from(old: KeysFile1) -> Self {
        Self {
            version: KEYS_VERSION,
            login_server: old.login_server,
            machine: old.machine,
            node: old.node,
            next: None,
            disco: old.disco,
            replaces: None,
        }
    }
}

impl From<KeysFile> for Keys {
    fn from(file: KeysFile) -> Self {
        Self {
            machine: file.machine.import().into(),
            node: file.node.import().into(),
            next: file.next.map(|next| next.import().into()),
            disco: file.disco.import().into(),
            replaces: file.replaces,
        }
    }
}

fn parse_netmap(path: &Path, text: &[u8]) -> Result<Netmap, Error> {
    check_version(path, text, NETMAP_VERSION)?;
    let file: OwnedNetmapFile =
        serde_json::from_slice(text).map_err(|error| damaged(path, &error))?;
    Ok(file.netmap)
}

/// The format of a file, which is looked at first: a later one may be quite another.
fn check_version(path: &Path, text: &[u8], newest: u32) -> Result<u32, Error> {
    match serde_json::from_slice(text) {
        Ok(Format { version }) if version <= newest => Ok(version),
        Ok(Format { version }) => Err(Error::TooNew {
            path: path.into(),
            version,
        }),
        Err(error) => Err(damaged(path, &error)),
    }
}

fn damaged(path: &Path, error: &serde_json::Error) -> Error {
    Error::Damaged {
        path: path.into(),
        line: error.line(),
        column: error.column(),
    }
}

/// Takes a directory for this process alone, and shuts it to other users.
fn lock(dir: &Path) -> Result<File, Error> {
    let unusable = |source| Error::Unusable {
        dir: dir.into(),
        source,
    };
    let handle = File::open(dir).map_err(unusable)?;
    match handle.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::InUse { dir: dir.into() }),
        Err(TryLockError::Error(source)) => return Err(unusable(source)),
    }
    let metadata = handle.metadata().map_err(unusable)?;
    own(dir, metadata.uid())?;
    if metadata.mode() & 0o077 != 0 {
        warn!(dir = %dir.display(), "others could enter the state directory; closing it");
        handle
            .set_permissions(Permissions::from_mode(0o700))
            .map_err(unusable)?;
    }
    Ok(handle)
}

fn own(path: &Path, owner: u32) -> Result<(), Error> {
    let ours = geteuid().as_raw();
    if owner == ours {
        return Ok(());
    }
    Err(Error::OtherOwner {
        path: path.into(),
        owner,
        ours,
    })
}

/// Reads a file that is ours, if it is there, and shuts it to other users.
fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let failed = |source| Error::Read {
        path: path.into(),
        source,
    };
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.map_err(failed)?,
    };
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is no regular file")));
    }
    own(path, metadata.uid())?;
    if metadata.mode() & 0o077 != 0 {
        warn!(path = %path.display(), "others could open the file if they got to it; closing it");
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    }
    fs::read(path).map(Some).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        env,
        io::{BufRead, Write},
        process::{Command, Stdio},
        thread,
        time::{Duration, Instant},
    };

    use proptest::prelude::*;
    use tailnode_wire::tailcfg::{MapResponse, Node};

    use super::*;

    fn server() -> Url {
        "https://control.example/".parse().unwrap()
    }

    fn netmap() -> Netmap {
        let me = Node::new(1, NodeKeyPair::random().public);
        let peers = Some(vec![Node::new(2, NodeKeyPair::random().public)]);
        let first = MapResponse {
            node: Some(me),
            peers,
            ..Default::default()
        };
        let mut netmap = Netmap::default();
        netmap.restart(first, Utc::now());
        netmap
    }

    #[test]
    fn keys_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/b");
        let keys = Store::open(&dir, &server()).unwrap().keys().unwrap();
        assert_eq!(Store::open(&dir, &server()).unwrap().keys().unwrap(), keys);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join(KEYS)), 0o600);
    }

    #[test]
    fn rotated_keys_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let mut keys = store.keys().unwrap();
        keys.node = NodeKeyPair::random();
        store.save_keys(&keys).unwrap();
        assert_eq!(store.keys().unwrap(), keys);
    }

    #[test]
    fn it_is_known_until_when_a_node_ran() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        assert_eq!(store.latest(), None);
        let keys = store.keys().unwrap();
        assert!(store.latest().is_some());
        let ahead = SystemTime::now() + Duration::from_secs(3600);
        store.save_latest(ahead).unwrap();
        assert_eq!(store.latest(), Some(ahead));
        assert_eq!(store.keys().unwrap(), keys);
    }

    #[test]
    fn two_daemons_do_not_share_a_node() {
        let dir = tempfile::tempdir().unwrap();
        let first = Store::open(dir.path(), &server()).unwrap();
        assert!(matches!(
            Store::open(dir.path(), &server()),
            Err(Error::InUse { .. })
        ));
        drop(first);
        Store::open(dir.path(), &server()).unwrap();
    }

    #[test]
    fn an_open_directory_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        Store::open(dir.path(), &server()).unwrap();
        assert_eq!(
            fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn a_node_stays_with_its_login_server() {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path(), &server()).unwrap().keys().unwrap();
        let other = "https://other.example/".parse().unwrap();
        let error = Store::open(dir.path(), &other).unwrap().keys().unwrap_err();
        assert!(
            error
                .to_string()
                .contains("https://control.example/, not of https://other")
        );
    }

    /// The files that were set aside, and what is in them.
    fn aside(dir: &Path) -> Vec<(String, String)> {
        let mut files: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_name().to_string_lossy().contains(".damaged-"))
            .map(|entry| {
                let name = entry.file_name().into_string().unwrap();
                (name, fs::read_to_string(entry.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    #[test]
    fn damaged_keys_are_set_aside_with_their_map_and_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let path = dir.path().join(KEYS);
        let texts = [
            "",
            "{",
            "{}",
            r#"{"version":1}"#,
            r#"{"version":2}"#,
            "\0\0\0\0",
        ];
        for (number, text) in texts.into_iter().enumerate() {
            fs::write(&path, text).unwrap();
            store.save_netmap(&netmap()).unwrap();
            let keys = store.keys().unwrap();
            let kept = keys.replaces.clone().unwrap();
            assert_eq!(fs::read_to_string(&kept).unwrap(), text);
            assert_eq!(aside(dir.path()).len(), 2 * (number + 1));
            assert_eq!(store.load_netmap(), None);
            // It is said until the node has joined.
            assert_eq!(store.keys().unwrap(), keys);
        }
        let joined = Keys {
            replaces: None,
            ..store.keys().unwrap()
        };
        store.save_keys(&joined).unwrap();
        assert_eq!(store.keys().unwrap(), joined);
    }

    #[test]
    fn a_crash_while_damaged_keys_are_set_aside_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let begin = || {
            fs::write(dir.path().join(KEYS), "{").unwrap();
            store.save_netmap(&netmap()).unwrap();
        };
        let steps: [&dyn Fn(); 3] = [
            &|| drop(store.set_aside(KEYS).unwrap()),
            &|| drop(store.set_aside(NETMAP).unwrap()),
            &|| store.remove(NETMAP).unwrap(),
        ];
        for stop in 0..=steps.len() {
            begin();
            steps[..stop].iter().for_each(|step| step());
            let keys = store.keys().unwrap();
            let kept = fs::read_to_string(keys.replaces.unwrap()).unwrap();
            assert_eq!((&*kept, store.load_netmap()), ("{", None));
            assert!(
                aside(dir.path())
                    .iter()
                    .all(|(name, text)| name.starts_with(NETMAP) || text == "{")
            );
        }
    }

    #[test]
    fn keys_of_a_newer_release_are_an_error_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let text = r#"{"version":3,"other":"things"}"#;
        fs::write(dir.path().join(KEYS), text).unwrap();
        let error = store.keys().unwrap_err().to_string();
        assert!(error.contains("format 3): upgrade"), "{error}");
        assert_eq!(fs::read_to_string(dir.path().join(KEYS)).unwrap(), text);
    }

    #[test]
    fn keys_of_format_1_are_read_and_brought_to_ours() {
        const OLD: &str = r#"{"version":1,"login_server":"https://control.example/",
            "machine":"privkey:0101010101010101010101010101010101010101010101010101010101010101",
            "node":"privkey:0202020202020202020202020202020202020202020202020202020202020202",
            "disco":"privkey:0303030303030303030303030303030303030303030303030303030303030303"}"#;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(KEYS), OLD).unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let keys = store.keys().unwrap();
        assert_eq!(keys.machine.private.export().as_bytes(), &[1; 32]);
        assert_eq!(keys.node.private.export().as_bytes(), &[2; 32]);
        assert_eq!(keys.disco.private.export().as_bytes(), &[3; 32]);
        assert_eq!((&keys.next, &keys.replaces), (&None, &None));
        let (version, _) = KeysFile::read(&dir.path().join(KEYS)).unwrap().unwrap();
        assert_eq!(version, 2);
        assert_eq!(store.keys().unwrap(), keys);
        assert!(aside(dir.path()).is_empty());
    }

    #[test]
    fn what_is_not_a_file_of_ours_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        fs::write(&elsewhere, "{}").unwrap();
        std::os::unix::fs::symlink(&elsewhere, dir.path().join(KEYS)).unwrap();
        let error = store.keys().unwrap_err().to_string();
        assert!(error.contains("no regular file"), "{error}");
        let ours = geteuid().as_raw();
        own(&elsewhere, ours).unwrap();
        let error = own(&elsewhere, ours + 1).unwrap_err().to_string();
        assert!(error.contains(&format!("chown {ours} ")), "{error}");
    }

    #[test]
    fn an_open_file_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let keys = store.keys().unwrap();
        let path = dir.path().join(KEYS);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(store.keys().unwrap(), keys);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_node_moves_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = (dir.path().join("here"), dir.path().join("there"));
        let origin = Path::new("web.json");
        assert!(matches!(export(&here), Err(Error::NoNode { .. })));
        let store = Store::open(&here, &server()).unwrap();
        assert!(matches!(export(&here), Err(Error::InUse { .. })));
        let (keys, map) = (store.keys().unwrap(), netmap());
        store.save_netmap(&map).unwrap();
        drop(store);
        let moving = export(&here).unwrap();
        assert!(!format!("{moving:?}").contains("machine"));
        import(&there, moving.expose(), origin).unwrap();
        assert!(matches!(
            import(&there, moving.expose(), origin),
            Err(Error::Taken { .. })
        ));
        let store = Store::open(&there, &server()).unwrap();
        assert_eq!(store.keys().unwrap(), keys);
        assert_eq!(store.load_netmap(), Some(map));

        let nowhere = dir.path().join("nowhere");
        let newer = moving.expose().replacen(":1,", ":2,", 1);
        for (text, words) in [
            ("", "web.json is damaged"),
            ("{\"version\":1}", "web.json is damaged"),
            (&moving.expose()[..200], "web.json is damaged"),
            (&newer, "newer release"),
        ] {
            let error = import(&nowhere, text, origin).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert!(!nowhere.exists());
        }
    }

    #[test]
    fn what_is_removed_is_a_whole_node_until_its_keys_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web");
        remove(&path).unwrap();
        let store = Store::open(&path, &server()).unwrap();
        store.keys().unwrap();
        store.save_netmap(&netmap()).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists());
        // As after a crash in the middle: what is left of the old node is not taken for the new.
        let store = Store::open(&path, &server()).unwrap();
        store.save_netmap(&netmap()).unwrap();
        store.keys().unwrap();
        assert_eq!(store.load_netmap(), None);
        assert!(aside(&path).is_empty());
    }

    /// Names the directory in which the test below is to be a daemon that writes and is killed; empty
    /// for the one that kills.
    const WRITER: &str = "TAILNODE_TEST_WRITER";

    /// What another thread starts has our locks too, until it is another program.
    fn open_soon(dir: &Path) -> Store {
        let begun = Instant::now();
        loop {
            match Store::open(dir, &server()) {
                Err(Error::InUse { .. }) if begun.elapsed() < Duration::from_secs(30) => {
                    thread::sleep(Duration::from_millis(1));
                }
                opened => return opened.unwrap(),
            }
        }
    }

    /// Nodes join, change their keys and keep their maps until the process is killed. It says who
    /// they are once that is promised to stay.
    fn write_for_ever(dir: &Path) -> ! {
        for turn in 0.. {
            let name = format!("node{}", (turn * turn + std::process::id()) % 7);
            let store = open_soon(&dir.join(&name));
            let mut keys = store.keys().unwrap();
            let machine = keys.machine.public;
            writeln!(io::stdout(), "node: {name} {machine:?}").unwrap();
            for _ in 0..3 {
                keys.next = Some(NodeKeyPair::random());
                store.save_keys(&keys).unwrap();
                keys.node = keys.next.take().unwrap();
                store.save_keys(&keys).unwrap();
                store.save_netmap(&netmap()).unwrap();
                store.save_latest(SystemTime::now()).unwrap();
            }
        }
        unreachable!()
    }

    #[test]
    fn no_node_loses_its_identity_when_its_daemon_is_killed_500_times() {
        let name = thread::current().name().unwrap().to_owned();
        match env::var_os(WRITER) {
            Some(dir) if dir.is_empty() => kill_500_times(&name),
            Some(dir) => write_for_ever(Path::new(&dir)),
            // Not from here: all that the other tests have locked, it would have too for a moment.
            None => assert!(again(&name, Path::new("")).status().unwrap().success()),
        }
    }

    /// This program, with one test, which is to be something else.
    fn again(test: &str, writer: &Path) -> Command {
        let mut again = Command::new(env::current_exe().unwrap());
        again.args(["--exact", test, "--nocapture"]);
        again.env(WRITER, writer);
        again
    }

    fn kill_500_times(test: &str) {
        // Some at a time: each waits for its disk and its end.
        thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| {
                    let dir = tempfile::tempdir().unwrap();
                    let mut known = BTreeMap::new();
                    for round in 0..100 {
                        kill_a_writer(dir.path(), test, &mut known);
                        // And now and then a node joins for the first time.
                        if round % 4 == 3
                            && let Some((node, _)) = known.pop_first()
                        {
                            remove(&dir.path().join(node)).unwrap();
                        }
                    }
                });
            }
        });
    }

    fn kill_a_writer(dir: &Path, test: &str, known: &mut BTreeMap<String, String>) {
        let mut writer = again(test, dir).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = io::BufReader::new(writer.stdout.take().unwrap()).lines();
        let mut learn = |line: &str| {
            let (node, machine) = line.strip_prefix("node: ")?.split_once(' ')?;
            let before = known.entry(node.into()).or_insert_with(|| machine.into());
            assert_eq!(before, machine, "{node} is another");
            Some(())
        };
        while learn(&lines.next().expect("the writer writes").unwrap()).is_none() {}
        thread::sleep(Duration::from_micros(rand::random_range(0..8000)));
        writer.kill().unwrap();
        writer.wait().unwrap();
        // The last line may be cut off, by its end at most.
        for line in lines.map_while(Result::ok) {
            if line.ends_with(')') {
                learn(&line);
            }
        }
        for (node, machine) in known {
            let dir = dir.join(node);
            let store = open_soon(&dir);
            let keys = store.keys().unwrap();
            assert_eq!(format!("{:?}", keys.machine.public), *machine, "{node}");
            store.load_netmap();
            assert!(aside(&dir).is_empty(), "{:?}", aside(&dir));
        }
    }

    #[test]
    fn a_damaged_map_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        assert_eq!(store.load_netmap(), None);
        let map = netmap();
        store.save_netmap(&map).unwrap();
        assert_eq!(store.load_netmap(), Some(map));
        fs::write(
            dir.path().join(NETMAP),
            "{\"version\":1,\"netmap\":{\"peers\"",
        )
        .unwrap();
        assert_eq!(store.load_netmap(), None);
        assert_eq!(aside(dir.path()).len(), 1);
        assert!(!dir.path().join(NETMAP).exists());
    }

    #[test]
    fn a_crash_while_writing_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let keys = store.keys().unwrap();
        fs::write(dir.path().join(".keys.json.new"), "{\"vers").unwrap();
        assert_eq!(store.keys().unwrap(), keys);
        store.save_keys(&keys).unwrap();
        assert_eq!(store.keys().unwrap(), keys);
    }

    #[test]
    fn a_failed_write_says_where_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        // Nothing can be renamed over a directory with something in it.
        fs::create_dir_all(dir.path().join(KEYS).join("x")).unwrap();
        let error = store.save_keys(&Keys::random()).unwrap_err().to_string();
        assert!(error.contains("keys.json"), "{error}");
        assert!(!dir.path().join(".keys.json.new").exists());
    }

    #[test]
    fn secrets_do_not_print() {
        let keys = Keys::random();
        let private = keys.node.private.export().to_string();
        assert!(!format!("{keys:?}").contains(&private[8..]));
    }

    proptest! {
        #[test]
        fn any_keys_come_back(bytes in any::<[[u8; 32]; 3]>(), next: bool, lost: Option<String>) {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path(), &server()).unwrap();
            let keys = Keys {
                machine: Export::<MachinePrivateKey>::from_bytes(bytes[0]).import().into(),
                node: Export::<NodePrivateKey>::from_bytes(bytes[1]).import().into(),
                next: next.then(NodeKeyPair::random),
                disco: Export::<DiscoPrivateKey>::from_bytes(bytes[2]).import().into(),
                replaces: lost.map(PathBuf::from),
            };
            store.save_keys(&keys).unwrap();
            prop_assert_eq!(store.keys().unwrap(), keys);
        }
    }
}
