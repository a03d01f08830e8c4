"""Read by alembic, which runs it for `indexer.catalog.schema.migrate`."""

from alembic import context

from indexer.catalog.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite cannot alter most of a table in place
    transactional_ddl=True,  # the caller's transaction holds all steps, on SQLite too
)
with context.begin_transaction():
    context.run_migrations()
