//! What outlives the process: one SQLite file, readable by its owner only.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{DirBuilder, OpenOptions},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use chrono::{DateTime, Utc};
use ipnet::IpNet;
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tailnode_wire::{
    keys::{
        DiscoPublicKey, Export, ExportableKey, MachineKeyPair, MachinePublicKey, NodeKeyPair,
        NodePublicKey,
    },
    tailcfg::{Hostinfo, NodeId, RegionId, UserId},
};

use crate::Error;

const FILE: &str = "control.sqlite";
const DOMAIN: &str = "domain";
/// Counts changes of the tables below.
const SCHEMA: i64 = 1;
const TABLES: &str = "
    CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE user (id INTEGER PRIMARY KEY AUTOINCREMENT, login TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE auth_key (id TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
    CREATE TABLE node (id INTEGER PRIMARY KEY AUTOINCREMENT, record TEXT NOT NULL) STRICT;
";
/// Another process (`tailnode-control key create`) may be writing.
const BUSY: Duration = Duration::from_secs(5);

/// An auth key; the secret itself is not kept, only its hash.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuthKey {
    /// Its public part, by which it is listed and expired.
    pub id: String,
    /// SHA-256 of the secret part, hex.
    pub(crate) hash: String,
    /// Login name of the owner of the nodes that join with it.
    pub user: String,
    /// It admits any number of nodes.
    pub reusable: bool,
    /// Its nodes are removed when they are gone.
    pub ephemeral: bool,
    /// Its nodes get these tags.
    pub tags: BTreeSet<String>,
    /// When it was made.
    pub created: DateTime<Utc>,
    /// When it ends; `None`: never.
    pub expires: Option<DateTime<Utc>>,
    /// A node has joined with it.
    pub used: bool,
}

/// A node that has joined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Member {
    /// Given by the store; 0 before that.
    pub id: NodeId,
    pub machine: MachinePublicKey,
    pub key: NodePublicKey,
    pub disco: Option<DiscoPublicKey>,
    /// What it wants to be called, made fit for DNS.
    pub wanted_name: String,
    /// What it is called: `wanted_name`, with a number if that was taken.
    pub name: String,
    pub ipv4: Ipv4Addr,
    pub user: String,
    pub tags: BTreeSet<String>,
    pub ephemeral: bool,
    pub created: DateTime<Utc>,
    pub last_seen: DateTime<Utc>,
    /// Since when its key is no longer good.
    pub expired: Option<DateTime<Utc>>,
    pub version: u32,
    pub hostinfo: Hostinfo,
    pub endpoints: Vec<SocketAddr>,
    pub home_derp: RegionId,
    /// Routes that an administrator has approved; the policy may approve more.
    #[serde(default)]
    pub approved_routes: BTreeSet<IpNet>,
}

/// The secrets that the server is known by.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// Of ts2021.
    pub machine: MachineKeyPair,
    /// Of the relay.
    pub derp: NodeKeyPair,
}

pub(crate) struct Store {
    db: Connection,
}

impl Store {
    /// Opens the state in `dir`, which is made if need be.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let unusable = |source| Error::StateDir {
            dir: dir.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(unusable)?;
        let path = dir.join(FILE);
        // SQLite would make it with the process's umask; its journals take the file's own mode.
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(unusable)?;
        let db = Connection::open(&path)?;
        db.busy_timeout(BUSY)?;
        db.pragma_update(None, "journal_mode", "wal")?;
        match db.pragma_query_value(None, "user_version", |row| row.get(0))? {
            0 => db.execute_batch(&format!(
                "BEGIN EXCLUSIVE; {TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;"
            ))?,
            SCHEMA => {}
            newer => {
                return Err(Error::NewerState {
                    path,
                    version: newer,
                });
            }
        }
        Ok(Self { db })
    }

    /// The server's keys, made at first use.
    pub fn identity(&self) -> Result<Identity, Error> {
        let machine = self.secret("machine_key", MachineKeyPair::random)?;
        let derp = self.secret("derp_key", NodeKeyPair::random)?;
        Ok(Identity { machine, derp })
    }

    fn secret<K: ExportableKey>(&self, name: &str, make: fn() -> K) -> Result<K, Error> {
        if let Some(text) = self.setting(name)? {
            let key = text
                .parse::<Export<K>>()
                .map_err(|_| Error::Damaged(name.to_owned()))?;
            return Ok(key.import());
        }
        let key = make();
        self.set_setting(name, &key.export().to_string())?;
        Ok(key)
    }

    /// The domain that the server last ran with.
    pub fn domain(&self) -> Result<Option<String>, Error> {
        self.setting(DOMAIN)
    }

    pub fn set_domain(&self, domain: &str) -> Result<(), Error> {
        self.set_setting(DOMAIN, domain)
    }

    pub fn setting(&self, name: &str) -> Result<Option<String>, Error> {
        let sql = "SELECT value FROM setting WHERE name = ?";
        Ok(self
            .db
            .query_row(sql, [name], |row| row.get(0))
            .optional()?)
    }

    pub fn set_setting(&self, name: &str, value: &str) -> Result<(), Error> {
        self.db.execute(
            "INSERT INTO setting (name, value) VALUES (?1, ?2)
             ON CONFLICT (name) DO UPDATE SET value = ?2",
            [name, value],
        )?;
        Ok(())
    }

    /// The user's number; a new login name gets one.
    pub fn user_id(&self, login: &str) -> Result<UserId, Error> {
        self.db
            .execute("INSERT OR IGNORE INTO user (login) VALUES (?)", [login])?;
        let sql = "SELECT id FROM user WHERE login = ?";
        Ok(self.db.query_row(sql, [login], |row| row.get(0))?)
    }

    pub fn keys(&self) -> Result<Vec<AuthKey>, Error> {
        let mut rows = self
            .db
            .prepare("SELECT record FROM auth_key ORDER BY rowid")?;
        let rows = rows.query_map([], |row| row.get::<_, String>(0))?;
        rows.map(|record| parse(&record?)).collect()
    }

    pub fn key(&self, id: &str) -> Result<Option<AuthKey>, Error> {
        let sql = "SELECT record FROM auth_key WHERE id = ?";
        let record = self
            .db
            .query_row(sql, [id], |row| row.get::<_, String>(0))
            .optional()?;
        record.map(|record| parse(&record)).transpose()
    }

    pub fn put_key(&self, key: &AuthKey) -> Result<(), Error> {
        self.db.execute(
            "INSERT INTO auth_key (id, record) VALUES (?1, ?2)
             ON CONFLICT (id) DO UPDATE SET record = ?2",
            [&key.id, &print(key)?],
        )?;
        Ok(())
    }

    pub fn members(&self) -> Result<BTreeMap<NodeId, Member>, Error> {
        let mut rows = self.db.prepare("SELECT id, record FROM node")?;
        let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)))?;
        rows.map(|row| {
            let (id, record) = row?;
            Ok((
                id,
                Member {
                    id,
                    ..parse(&record)?
                },
            ))
        })
        .collect()
    }

    /// Adds a node and gives it its number, which no other node ever gets.
    pub fn add_member(&self, member: &mut Member) -> Result<(), Error> {
        self.db
            .execute("INSERT INTO node (record) VALUES (?)", [print(member)?])?;
        member.id = self.db.last_insert_rowid();
        Ok(())
    }

    pub fn put_member(&self, member: &Member) -> Result<(), Error> {
        let sql = "UPDATE node SET record = ? WHERE id = ?";
        self.db.execute(sql, params![print(member)?, member.id])?;
        Ok(())
    }

    pub fn remove_member(&self, id: NodeId) -> Result<(), Error> {
        self.db.execute("DELETE FROM node WHERE id = ?", [id])?;
        Ok(())
    }
}

fn parse<T: DeserializeOwned>(record: &str) -> Result<T, Error> {
    serde_json::from_str(record).map_err(|error| Error::Damaged(error.to_string()))
}

fn print<T: Serialize>(record: &T) -> Result<String, Error> {
    serde_json::to_string(record).map_err(|error| Error::Damaged(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_state_is_private_and_the_keys_stay() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        let first = Store::open(&dir).unwrap().identity().unwrap();
        let second = Store::open(&dir).unwrap().identity().unwrap();
        assert_eq!(first.machine, second.machine);
        assert_eq!(first.derp, second.derp);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        for file in std::fs::read_dir(&dir).unwrap() {
            assert_eq!(mode(&file.unwrap().path()), 0o600);
        }
    }

    #[test]
    fn a_newer_state_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store
            .db
            .pragma_update(None, "user_version", SCHEMA + 1)
            .unwrap();
        drop(store);
        assert!(matches!(
            Store::open(dir.path()),
            Err(Error::NewerState { version: 2, .. })
        ));
    }
}
