//! What Podman knows of its containers and does not tell its plugins.
//!
//! Asking `podman inspect` would wait for the lock that Podman holds while it waits for us; reading
//! its state database takes no lock of Podman's. But the schema is Podman's own business, so
//! whatever goes wrong is a warning.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, Row, types::Type};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};

use crate::{interface, options::Marks};

/// ContainerStateRunning (libpod/define/containerstate.go).
const RUNNING: u32 = 3;

/// The part of Podman's ContainerConfig that is read here (libpod/container_config.go).
#[derive(Deserialize)]
struct ContainerConfig {
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    spec: Option<Spec>,
    /// Whether Podman makes it a network namespace that is connected to something.
    #[serde(default, rename = "createNetNS")]
    connects: Option<bool>,
    /// By what.
    #[serde(default, rename = "networkMode")]
    mode: Option<String>,
}

/// The part of the OCI configuration in it.
#[derive(Default, Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    process: Option<Process>,
}

#[derive(Deserialize)]
struct Process {
    #[serde(default)]
    env: Option<Vec<String>>,
}

/// The part of its ContainerState (libpod/container.go).
#[derive(Deserialize)]
struct ContainerState {
    state: u32,
    /// The file of the namespace. After a reboot it is gone, while all else says "running".
    #[serde(default)]
    netns: Option<PathBuf>,
    /// What the plugins answered, by network.
    #[serde(default, rename = "networkStatus")]
    networks: Option<BTreeMap<String, StatusBlock>>,
}

#[derive(Deserialize)]
struct StatusBlock {
    #[serde(default)]
    interfaces: Option<BTreeMap<String, IgnoredAny>>,
}

/// A container.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) name: String,
}

/// What a container carries; nothing when it cannot be read. Blocks for at most a quarter of a
/// second.
pub(crate) fn marks(database: &Path, container_id: &str) -> Marks {
    let read = |podman: Connection| {
        let config = config(&podman, container_id)?;
        let spec = config.spec.unwrap_or_default();
        let environment = spec.process.and_then(|process| process.env);
        let environment = environment.unwrap_or_default();
        let pairs = environment.iter().filter_map(|line| line.split_once('='));
        Ok(Marks {
            labels: config.labels.unwrap_or_default(),
            annotations: spec.annotations.unwrap_or_default(),
            environment: pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
        })
    };
    look(database, read).unwrap_or_else(|error| {
        tracing::warn!(
            container_id,
            database = %database.display(),
            "cannot read the container's labels, annotations and environment, so they set nothing: \
             {error}"
        );
        Marks::default()
    })
}

/// Whether Podman connects the container to networks; `None` when that cannot be read. What leads to
/// the host alone is none. Blocks for at most a quarter of a second.
pub(crate) fn connects(database: &Path, container_id: &str) -> Option<bool> {
    let read = |podman: Connection| {
        let config = config(&podman, container_id)?;
        let is_alone = matches!(config.mode.as_deref(), Some("pasta" | "slirp4netns"));
        Ok(config.connects.map(|connects| connects && !is_alone))
    };
    look(database, read).unwrap_or_else(|error| {
        tracing::warn!(
            container_id,
            database = %database.display(),
            "cannot tell whether the container has networks: {error}"
        );
        None
    })
}

/// The container's name; `None` when it cannot be read. Blocks for at most a quarter of a second.
pub(crate) fn name(database: &Path, container_id: &str) -> Option<String> {
    let read = |podman: Connection| {
        let sql = "SELECT Name FROM ContainerConfig WHERE ID = ?";
        podman
            .query_row(sql, [container_id], |row| row.get(0))
            .map(Some)
    };
    look(database, read).unwrap_or_else(|error| {
        tracing::warn!(
            container_id,
            database = %database.display(),
            "cannot read the container's name: {error}"
        );
        None
    })
}

/// The names of all containers; `None` when they cannot be read. Blocks for at most a quarter of a
/// second.
pub(crate) fn names(database: &Path) -> Option<HashSet<String>> {
    let read = |podman: Connection| {
        let mut all = podman.prepare("SELECT Name FROM ContainerConfig")?;
        let names = all.query_map([], |row| row.get(0))?;
        names.collect::<Result<_, _>>().map(Some)
    };
    look(database, read).unwrap_or_else(|error| {
        tracing::warn!(
            database = %database.display(),
            "cannot tell which containers Podman has: {error}"
        );
        None
    })
}

/// The running containers with a device of a tailnet. Blocks for at most a quarter of a second.
pub(crate) fn running(database: &Path) -> Vec<Container> {
    let read = |podman: Connection| {
        let mut all = podman.prepare(
            "SELECT ID, Name, CAST(ContainerState.JSON AS TEXT)
            FROM ContainerConfig JOIN ContainerState USING (ID) ORDER BY Name",
        )?;
        let mut rows = all.query([])?;
        let mut running = Vec::new();
        while let Some(row) = rows.next()? {
            if json::<ContainerState>(row, 2)?.is_on_a_tailnet() {
                running.push(Container {
                    id: row.get(0)?,
                    name: row.get(1)?,
                });
            }
        }
        Ok(running)
    };
    look(database, read).unwrap_or_else(|error| {
        tracing::warn!(
            database = %database.display(),
            "cannot tell which containers of Podman's run without a tailnet: {error}"
        );
        Vec::new()
    })
}

impl ContainerState {
    fn is_on_a_tailnet(&self) -> bool {
        let mut devices = self
            .networks
            .iter()
            .flat_map(BTreeMap::values)
            .flat_map(|network| &network.interfaces)
            .flat_map(BTreeMap::keys);
        self.state == RUNNING
            && self.netns.as_ref().is_some_and(|netns| netns.exists())
            && devices.any(|device| interface::index_of(device).is_some())
    }
}

fn config(podman: &Connection, container_id: &str) -> rusqlite::Result<ContainerConfig> {
    podman.query_row(
        "SELECT CAST(JSON AS TEXT) FROM ContainerConfig WHERE ID = ?",
        [container_id],
        |row| json(row, 0),
    )
}

/// Reads something in the database. Without a database there is nothing.
fn look<T: Default>(
    database: &Path,
    read: impl FnOnce(Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    if !database.exists() {
        tracing::debug!(database = %database.display(), "Podman has no database");
        return Ok(T::default());
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(database, flags)?;
    connection.busy_timeout(Duration::from_millis(200))?;
    read(connection)
}

/// Reads a column of JSON. Podman stores blobs in its columns of texts, so each is cast.
fn json<T: DeserializeOwned>(row: &Row, column: usize) -> rusqlite::Result<T> {
    serde_json::from_str(&row.get::<_, String>(column)?).map_err(|error| {
        // Without serde's own words: they quote what they fail on, and a container's environment is
        // there too.
        let place = format!(
            "not as it was, from line {} column {} on",
            error.line(),
            error.column()
        );
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, place.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_come_from_the_database_and_trouble_is_no_failure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db.sql");
        assert_eq!(marks(&path, "c1"), Marks::default());
        assert_eq!(names(&path), None);
        let connection = Connection::open(&path).unwrap();
        assert_eq!(marks(&path, "c1"), Marks::default());
        connection
            .execute_batch(
                r#"CREATE TABLE ContainerConfig(ID TEXT PRIMARY KEY, Name TEXT, PodID TEXT, JSON TEXT);
                INSERT INTO ContainerConfig VALUES
                    ('c1', 'web', NULL, CAST('{"id":"c1","createNetNS":true,"labels":{"tailscale.hostname":"www"},"spec":
                        {"annotations":{"a":"b"},"process":{"env":["PATH=/bin","TS_HOSTNAME=a=b","odd"]}}}' AS BLOB)),
                    ('c2', 'bare', NULL, CAST('{"id":"c2","createNetNS":false}' AS BLOB)),
                    ('c3', 'odd', NULL, '[]'),
                    ('c5', 'pasta', NULL, CAST('{"id":"c5","createNetNS":true,"networkMode":"pasta"}' AS BLOB)),
                    ('c6', 'lan', NULL, CAST('{"id":"c6","createNetNS":true,"networkMode":"bridge"}' AS BLOB));"#,
            )
            .unwrap();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            marks(&path, "c1"),
            Marks {
                labels: [pair("tailscale.hostname", "www")].into(),
                annotations: [pair("a", "b")].into(),
                environment: [pair("PATH", "/bin"), pair("TS_HOSTNAME", "a=b")].into(),
            }
        );
        let all = ["web", "bare", "odd", "pasta", "lan"].map(String::from);
        assert_eq!(names(&path), Some(all.into()));
        assert_eq!(name(&path, "c1").as_deref(), Some("web"));
        assert_eq!(name(&path, "c4"), None);
        for (id, expected) in [
            ("c1", Some(true)),
            ("c2", Some(false)),
            ("c3", None),
            ("c4", None),
            ("c5", Some(false)),
            ("c6", Some(true)),
        ] {
            assert_eq!(connects(&path, id), expected, "{id}");
        }
        for id in ["c2", "c3", "c4"] {
            assert_eq!(marks(&path, id), Marks::default(), "{id}");
        }
        // A write in progress does not hold us up beyond the limit, and is no failure.
        connection.execute_batch("BEGIN EXCLUSIVE").unwrap();
        assert_eq!(marks(&path, "c1"), Marks::default());
        assert_eq!(names(&path), None);
        connection.execute_batch("ROLLBACK").unwrap();
        // Another schema, as some release of Podman's to come may have, costs what is in it.
        connection
            .execute_batch("ALTER TABLE ContainerConfig RENAME COLUMN JSON TO Config")
            .unwrap();
        assert_eq!(marks(&path, "c1"), Marks::default());
    }

    #[test]
    fn what_cannot_be_read_is_not_repeated() {
        let podman = Connection::open_in_memory().unwrap();
        for json in [
            r#"{"labels":"QQQQ"}"#,
            r#"{"spec":{"process":{"env":{"A":"QQQQ"}}}}"#,
            r#"{"spec":{"process":{"env":"QQQQ"}}}"#,
            r#""QQQQ""#,
            "QQQQ",
        ] {
            let read = podman.query_row("SELECT ?1", [json], |row| {
                self::json::<ContainerConfig>(row, 0).map(|_| ())
            });
            let error = read.unwrap_err();
            assert!(!format!("{error} {error:?}").contains("QQQQ"), "{error}");
        }
    }

    #[test]
    fn those_that_run_on_a_tailnet_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db.sql");
        assert!(running(&path).is_empty());
        let connection = Connection::open(&path).unwrap();
        assert!(running(&path).is_empty());
        connection
            .execute_batch(
                r#"CREATE TABLE ContainerConfig(ID TEXT PRIMARY KEY, Name TEXT, PodID TEXT, JSON TEXT);
                CREATE TABLE ContainerState(ID TEXT PRIMARY KEY, State INTEGER, ExitCode INTEGER, JSON TEXT);"#,
            )
            .unwrap();
        let here = path.display();
        for (name, state) in [
            // As Podman 5.4.2 writes it.
            (
                "on",
                format!(
                    r#"{{"state":3,"configPath":"/x","pid":272,"netns":"{here}","networkStatus":
                {{"tailnet":{{"interfaces":{{"tailscale0":{{"subnets":[{{"ipnet":"100.69.21.121/32"}}],
                "mac_address":""}}}},"dns_server_ips":["100.100.100.100"]}}}}}}"#
                ),
            ),
            (
                "elsewhere",
                format!(
                    r#"{{"state":3,"netns":"{here}",
                "networkStatus":{{"lan":{{"interfaces":{{"eth0":{{}}}}}}}}}}"#
                ),
            ),
            (
                "ended",
                format!(
                    r#"{{"state":6,"netns":"{here}",
                "networkStatus":{{"tailnet":{{"interfaces":{{"tailscale0":{{}}}}}}}}}}"#
                ),
            ),
            (
                "rebooted",
                r#"{"state":3,"netns":"/nonexistent",
                "networkStatus":{"tailnet":{"interfaces":{"tailscale0":{}}}}}"#
                    .to_owned(),
            ),
            ("bare", r#"{"state":1,"networkStatus":null}"#.to_owned()),
        ] {
            let id = format!("id-{name}");
            connection
                .execute(
                    "INSERT INTO ContainerConfig VALUES (?1, ?2, NULL, '{}')",
                    [&id, name],
                )
                .unwrap();
            connection
                .execute(
                    "INSERT INTO ContainerState VALUES (?1, 1, 0, ?2)",
                    (&id, state.into_bytes()),
                )
                .unwrap();
        }
        let on = Container {
            id: "id-on".into(),
            name: "on".into(),
        };
        assert_eq!(running(&path), [on]);
    }
}
