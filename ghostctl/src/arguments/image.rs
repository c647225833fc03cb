//! `ghostctl image …`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use super::{Change, completers};

/// The image cache, and what can be pulled into it.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// List the images in the cache
    #[command(visible_alias = "ls")]
    List,
    /// List the official images that can be pulled by name
    Catalogue,
    /// Download an image and verify it
    Pull(ImagePull),
    /// Upload an image file (raw or qcow2, also compressed with gzip, xz or zstd)
    Import(ImageImport),
    /// Show all that is known of images
    Show(ImageNames),
    /// Remove images from the cache
    #[command(visible_alias = "rm")]
    Delete(ImageDelete),
}

/// `image pull`.
#[derive(Debug, Args)]
pub(crate) struct ImagePull {
    /// A name of the catalogue, or with --url the name that the image gets
    #[arg(add = completers::catalogue())]
    pub(crate) name: String,

    /// From where (https)
    #[arg(long, requires = "checksum", value_hint = ValueHint::Url)]
    pub(crate) url: Option<String>,

    /// What it must be: sha256:… or sha512:…
    #[arg(long, requires = "url", value_name = "SUM")]
    pub(crate) checksum: Option<String>,

    #[command(flatten)]
    pub(crate) change: Change,
}

/// `image import`.
#[derive(Debug, Args)]
pub(crate) struct ImageImport {
    /// The file, or - for stdin
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,

    /// The name that the image gets [default: the file's, without its endings]
    #[arg(long)]
    pub(crate) name: Option<String>,

    #[command(flatten)]
    pub(crate) change: Change,
}

/// One or several images.
#[derive(Debug, Args)]
pub(crate) struct ImageNames {
    /// Names of images in the cache
    #[arg(required = true, value_name = "NAME", add = completers::images())]
    pub(crate) names: Vec<String>,
}

/// `image delete`.
#[derive(Debug, Args)]
pub(crate) struct ImageDelete {
    #[command(flatten)]
    pub(crate) images: ImageNames,
    #[command(flatten)]
    pub(crate) change: Change,
}
