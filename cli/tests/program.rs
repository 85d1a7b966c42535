//! The program as a shell sees it, as far as it goes without the daemon.

#![allow(
    clippy::unwrap_used,
    reason = "a test reports by panicking, and not only in its own body"
)]

use std::process::Command;

/// Exit status, standard output and standard error.
fn tailnode(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_tailnode"))
        .args(arguments)
        .env("TAILNODE_SOCKET", "/nowhere/tailnoded.sock")
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn without_the_daemon_it_says_what_to_start() {
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["status", "web"],
        &["explain", "web"],
    ] {
        let (status, output, error) = tailnode(arguments);
        assert_eq!((status, &*output), (Some(1), ""), "{arguments:?}");
        for words in ["tailnode: ", "/nowhere/tailnoded.sock", "systemctl start"] {
            assert!(error.contains(words), "{arguments:?}: {error}");
        }
    }
}

#[test]
fn version_and_help_need_no_daemon_and_wrong_usage_is_2() {
    let (status, output, _) = tailnode(&["--version"]);
    assert_eq!(status, Some(0));
    assert_eq!(
        output,
        concat!("tailnode ", env!("CARGO_PKG_VERSION"), "\n")
    );
    let (status, output, _) = tailnode(&["status", "--help"]);
    assert_eq!(status, Some(0));
    assert!(output.contains("Exit status"), "{output}");
    for arguments in [&["options"][..], &["options", "--man"]] {
        let (status, output, _) = tailnode(arguments);
        assert_eq!(status, Some(0));
        let output = output.replace("\\-", "-");
        assert!(output.contains("exit-node-allow-lan-access"), "{output}");
    }
    for arguments in [&[][..], &["statsu"], &["status", "--jsn"]] {
        let (status, _, error) = tailnode(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {error}");
    }
}
